// What goctconv_norm_act and goctconv_norm_depthwise are given beside their maps, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

// The five vectors of one op, [n], all of the maps' dtype or, beside maps in half precision, float32 (as under
// autocast).
inline Tensors norm_act_vectors(const char* op, const char* const (&names)[5], const Tensor* const (&given)[5],
                                int64_t n, const Tensor& map) {
  Tensors out;
  for (int i = 0; i < 5; ++i) {
    check_device(op, names[i], *given[i], map);
    check_vector(op, names[i], *given[i], n, *given[0]);
    out.push_back(torch::stable::contiguous(*given[i]));
  }
  const ScalarType type = out[0].scalar_type(), of_maps = map.scalar_type();
  const bool half = of_maps == ScalarType::Half || of_maps == ScalarType::BFloat16;
  check(type == of_maps || (half && type == ScalarType::Float), op, names[0], " must be of the dtype of xs",
        half ? ", or float32" : "");
  return out;
}

// The kernel of the depthwise convolution behind the norm: [n, 1, 3, 3], of the vectors' dtype.
inline Tensor checked_kernel(const char* op, const Tensor& kernel, int64_t n, const Tensor& weight) {
  check_like(op, "kernel", kernel, weight);
  check(kernel.dim() == 4 && kernel.size(0) == n && kernel.size(1) == 1 && kernel.size(2) == 3 && kernel.size(3) == 3,
        op, "kernel must have shape (", n, ", 1, 3, 3), got ", shape_of(kernel));
  return torch::stable::contiguous(kernel);
}

// For the moments of every plane of such maps; without training there are none.
inline Tensor empty_moments(const Tensor& like, const Pyramid& maps, bool training) {
  const std::vector<int64_t> size =
      training ? std::vector<int64_t>{maps.total(), maps.batch, 2} : std::vector<int64_t>{0};
  return torch::stable::new_empty(like, size, ScalarType::Double);
}

}  // namespace sodfast
