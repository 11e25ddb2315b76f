// The geometry of the depthwise convolution's arguments, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

inline DepthwiseShape shape_for(const char* op, const char* name, const Tensors& xs, const Tensor& weight,
                                int64_t dilation) {
  const DepthwiseShape shape{pyramid_of(op, name, xs), dilation};
  check(dilation >= 1, op, "dilation must be at least 1, got ", dilation);
  check_like(op, "weight", weight, xs[0]);
  check(weight.dim() == 4 && weight.size(0) == shape.maps.total() && weight.size(1) == 1 && weight.size(2) == 3 &&
            weight.size(3) == 3,
        op, "weight must have shape (", shape.maps.total(), ", 1, 3, 3) for these scales, got ", shape_of(weight));
  return shape;
}

}  // namespace sodfast
