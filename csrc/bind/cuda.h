// What the bindings of the CUDA kernels need. on_device is the only way to a stream: it sets the device of the tensors,
// takes torch's current stream there, and checks what the launch returned. Memory comes from torch alone (outputs and
// workspaces are tensors), so that everything can be captured in a CUDA graph.
#pragma once

#define SODFAST_BIND_CUDA
#include "bind/common.h"
#include "cuda/kernels.h"

#ifndef SODFAST_CUDA_ON_HOST
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// The tests' library, whose kernels run on the host, takes CPU tensors under a namespace of its own.
#ifdef SODFAST_CUDA_ON_HOST
#define SODFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sodfast_cuda_on_host, CPU, m)
#else
#define SODFAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sodfast, CUDA, m)
#endif

namespace sodfast {

// Looked up in the torch that is loaded: so one build serves torch with and without CUDA.
inline cudaStream_t current_stream([[maybe_unused]] const char* op, [[maybe_unused]] int32_t device) {
#ifdef SODFAST_CUDA_ON_HOST
  return nullptr;
#else
  using Function = decltype(&aoti_torch_get_current_cuda_stream);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library != nullptr ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                              : nullptr;
  }();
  check(function != nullptr, op, "this torch has no CUDA");
  void* stream = nullptr;
  check(function(device, &stream) == AOTI_TORCH_SUCCESS, op, "torch gave no stream for device ", device);
  return static_cast<cudaStream_t>(stream);
#endif
}

// Runs f(stream) on the device of `like`; f returns what its launches returned.
template <class F>
void on_device(const char* op, const Tensor& like, const F& f) {
  const int32_t device = like.get_device_index();
#ifndef SODFAST_CUDA_ON_HOST
  const torch::stable::accelerator::DeviceGuard guard(device);
#endif
  const cudaError_t error = f(current_stream(op, device));
  check(error == cudaSuccess, op, "the launch failed: ", cudaGetErrorString(error));
}

inline cuda::Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return cuda::Type::f16;
    case ScalarType::BFloat16:
      return cuda::Type::bf16;
    case ScalarType::Double:
      return cuda::Type::f64;
    default:
      return cuda::Type::f32;
  }
}

// Data pointers, checked before.
inline std::vector<const void*> read(const Tensors& xs) {
  std::vector<const void*> p;
  for (const Tensor& x : xs) p.push_back(x.const_data_ptr());
  return p;
}
inline std::vector<void*> write(const Tensors& xs) {
  std::vector<void*> p;
  for (const Tensor& x : xs) p.push_back(x.mutable_data_ptr());
  return p;
}
inline cuda::Vector read_vector(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), type_of(t)}; }
inline cuda::Vector write_vector(const Tensor& t) { return {t.mutable_data_ptr(), type_of(t)}; }

// Memory between two launches; freed in the stream's order.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  const std::vector<int64_t> size{bytes};
  return torch::stable::new_empty(like, size, ScalarType::Byte);
}

}  // namespace sodfast
