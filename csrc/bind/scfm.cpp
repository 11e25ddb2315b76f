// torch.ops.sodfast.scfm and its gradients on the CPU.
#include "bind/scfm.h"

#include <tuple>

#include "bind/cpu.h"

namespace sodfast {
namespace {

Tensor scfm(const Tensor& x, const Tensor& y, bool multiply) {
  const MemoryFormat format = format_of(x);
  const ScfmShape shape = laid_out(scfm_shape("scfm", x, y, multiply), x, format);
  const Tensor in = contiguous_in(format, x), small = contiguous_in(format, y), out = empty_maps(x, format);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().scfm(shape, read<T>(in), read<T>(small), write<T>(out), torch_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> scfm_backward(const Tensor& grad, const Tensor& x, const Tensor& y, bool multiply) {
  const char* op = "scfm_backward";
  const MemoryFormat format = format_of(x);
  const ScfmShape shape = laid_out(scfm_shape(op, x, y, multiply), x, format);
  check_same_shape(op, "grad", grad, x);
  const Tensor g = contiguous_in(format, grad), in = contiguous_in(format, x), small = contiguous_in(format, y);
  const Tensor gx = multiply ? empty_maps(x, format) : empty_for(x, {0}), gy = empty_maps(y, format);
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
