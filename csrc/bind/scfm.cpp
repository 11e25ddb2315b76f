// torch.ops.sodfast.scfm and its gradients on the CPU.
#include "bind/scfm.h"

#include <tuple>

#include "bind/cpu.h"

namespace sodfast {
namespace {

Tensor scfm(const Tensor& x, const Tensor& y, bool multiply) {
  const ScfmShape shape = scfm_shape("scfm", x, y, multiply);
  const Tensor in = torch::stable::contiguous(x), small = torch::stable::contiguous(y), out = empty_maps(x);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().scfm(shape, read<T>(in), read<T>(small), write<T>(out), torch_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> scfm_backward(const Tensor& grad, const Tensor& x, const Tensor& y, bool multiply) {
  const char* op = "scfm_backward";
  const ScfmShape shape = scfm_shape(op, x, y, multiply);
  check_same_shape(op, "grad", grad, x);
  const Tensor g = torch::stable::contiguous(grad), in = torch::stable::contiguous(x),
               small = torch::stable::contiguous(y);
  const Tensor gx = multiply ? empty_maps(x) : empty_for(x, {0}), gy = empty_maps(y);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().scfm_backward(shape, read<T>(g), read<T>(in), read<T>(small), write<T>(gx), write<T>(gy),
                               torch_threads());
  });
  return {gx, gy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("scfm", TORCH_BOX(&scfm));
  m.impl("scfm_backward", TORCH_BOX(&scfm_backward));
}

}  // namespace sodfast
