// What the bindings of the CPU kernels need: typed pointers, and torch's threads.
#pragma once

#include "bind/common.h"
#include "cpu/kernels.h"

namespace sodfast {

// Data pointers of a list; T is float or double, already checked.
template <class T>
std::vector<const T*> read(const Tensors& xs) {
  std::vector<const T*> p;
  for (const Tensor& x : xs) p.push_back(static_cast<const T*>(x.const_data_ptr()));
  return p;
}
template <class T>
std::vector<T*> write(const Tensors& xs) {
  std::vector<T*> p;
  for (const Tensor& x : xs) p.push_back(static_cast<T*>(x.mutable_data_ptr()));
  return p;
}
template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
const T* read(const std::optional<Tensor>& x) {  // null where there is none
  return x.has_value() ? read<T>(*x) : nullptr;
}
template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls f(float()) or f(double()).
template <class F>
void for_dtype(const Tensor& like, const F& f) {
  like.scalar_type() == ScalarType::Float ? f(float()) : f(double());
}

inline Parallel torch_threads() {
  return {[](int64_t n, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  }};
}

}  // namespace sodfast
