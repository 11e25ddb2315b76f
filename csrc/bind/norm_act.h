// The vectors of a norm's arguments on the CPU.
#pragma once

#include "bind/cpu.h"

namespace sodfast {

// The five vectors of one op, checked: [n], of the maps' dtype and device.
inline Tensors norm_act_vectors(const char* op, const char* const (&names)[5], const Tensor* const (&given)[5],
                                int64_t n, const Tensor& map) {
  Tensors out;
  for (int i = 0; i < 5; ++i) {
    check_vector(op, names[i], *given[i], n, map);
    out.push_back(torch::stable::contiguous(*given[i]));
  }
  return out;
}

// The moments of the maps where they were given, for the kernels.
inline const double* pointer_to(const std::optional<Tensor>& moments) {
  return moments.has_value() ? read<double>(*moments) : nullptr;
}

// What the kernels take for a batch's statistics where there is no training.
template <class T>
void copy_statistics(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var) {
  for (int64_t i = 0; i < mean.numel(); ++i) {
    write<T>(mean)[i] = read<T>(running_mean)[i];
    write<T>(var)[i] = read<T>(running_var)[i];
  }
}

}  // namespace sodfast
