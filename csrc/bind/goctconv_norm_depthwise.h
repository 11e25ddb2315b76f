// The depthwise kernel behind a norm, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

// [n, 1, 3, 3], of the parameters' dtype and device.
inline Tensor checked_kernel(const char* op, const Tensor& kernel, int64_t n, const Tensor& weight) {
  check_like(op, "kernel", kernel, weight);
  check(kernel.dim() == 4 && kernel.size(0) == n && kernel.size(1) == 1 && kernel.size(2) == 3 && kernel.size(3) == 3,
        op, "kernel must have shape (", n, ", 1, 3, 3), got ", shape_of(kernel));
  return torch::stable::contiguous(kernel);
}

}  // namespace sodfast
