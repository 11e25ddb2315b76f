// The vectors of a norm's arguments on CUDA. Parameters and statistics may stay float32 beside half-precision maps, as
// under autocast.
#pragma once

#include "bind/cuda.h"

namespace sodfast {

// The five vectors of one op, checked: all of one dtype, float32 or that of the maps.
inline Tensors norm_act_vectors(const char* op, const char* const (&names)[5], const Tensor* const (&given)[5],
                                int64_t n, const Tensor& map) {
  Tensors out;
  for (int i = 0; i < 5; ++i) {
    check_device(op, names[i], *given[i], map);
    check_vector(op, names[i], *given[i], n, *given[0]);
    out.push_back(torch::stable::contiguous(*given[i]));
  }
  const ScalarType type = out[0].scalar_type();
  check(type == map.scalar_type() || type == ScalarType::Float, op, "weight must be float32 or of the dtype of xs");
  return out;
}

}  // namespace sodfast
