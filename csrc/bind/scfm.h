// The arguments of SCFM's fusion, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

// Sides stay below 2^30, so that kernels can double them in 32 bits.
inline ScfmShape scfm_shape(const char* op, const Tensor& x, const Tensor& y, bool multiply) {
  check_device(op, "x", x, x);
  check(is_known(x.scalar_type()), op, "x must be ", known_dtypes);
  check_like(op, "y", y, x);
  check(x.dim() == 4, op, "x must have 4 dimensions (B, C, H, W), got ", shape_of(x));
  check(y.dim() == 4 && y.size(0) == x.size(0) && y.size(1) == x.size(1), op, "y must have shape (", x.size(0), ", ",
        x.size(1), ", h, w) as x has, got ", shape_of(y));
  for (const Tensor* t : {&x, &y})
    for (int64_t d = 2; d < 4; ++d)
      check(t->size(d) > 0 && t->size(d) < int64_t(1) << 30, op, "an empty or too large size: ", shape_of(*t));
  ScfmShape shape;
  shape.maps = x.size(0) * x.size(1), shape.rows = x.size(2), shape.cols = x.size(3);
  shape.from_rows = y.size(2), shape.from_cols = y.size(3), shape.multiply = multiply;
  return shape;
}

// The shape of maps that lie channels last, where x does: the others then come to lie so too.
inline ScfmShape laid_out(ScfmShape shape, const Tensor& x, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) shape.maps = x.size(0), shape.channels = x.size(1);
  return shape;
}

}  // namespace sodfast
