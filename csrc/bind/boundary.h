// The arguments of boundaries and of the structure polishing loss, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

inline BoundaryShape boundary_shape(const char* op, const char* name, const Tensor& z, int64_t k, int64_t thin) {
  check_device(op, name, z, z);
  check(is_known(z.scalar_type()), op, name, " must be ", known_dtypes);
  check(z.dim() == 4, op, name, " must have 4 dimensions (B, C, H, W), got ", shape_of(z));
  check(z.size(2) > 0 && z.size(3) > 0, op, name, " has an empty size: ", shape_of(z));
  check(k >= 1 && k <= 31 && k % 2 == 1, op, "k must be odd and from 1 to 31, got ", k);
  check(thin >= 1 && thin <= 3, op, "thin must be 1, 2 or 3, got ", thin);
  return {z.size(0) * z.size(1), z.size(2), z.size(3), k, static_cast<int>(thin)};
}

inline BoundaryShape loss_shape(const char* op, const Tensor& logits, const Tensor& truth, int64_t k) {
  const BoundaryShape shape = boundary_shape(op, "logits", logits, k, thin_erosion);
  check(logits.size(1) == 1, op, "logits must have shape (B, 1, H, W), got ", shape_of(logits));
  check_same_shape(op, "truth", truth, logits);
  return shape;
}

// The gradient of the six sums of each image.
inline void check_grad_of_sums(const char* op, const Tensor& grad, const BoundaryShape& shape, const Tensor& logits) {
  check_like(op, "grad", grad, logits);
  check(grad.dim() == 3 && grad.size(0) == shape.planes && grad.size(1) == 2 && grad.size(2) == 3, op,
        "grad must have shape (", shape.planes, ", 2, 3), got ", shape_of(grad));
}

}  // namespace sodfast
