// torch.ops.sodfast.scfm and its gradients on CUDA.
#include <tuple>

#include "bind/cuda.h"
#include "bind/scfm.h"

namespace sodfast {
namespace {

Tensor scfm(const Tensor& x, const Tensor& y, bool multiply) {
  const MemoryFormat format = format_of(x);
  const ScfmShape shape = laid_out(scfm_shape("scfm", x, y, multiply), x, format);
  const Tensor in = contiguous_in(format, x), small = contiguous_in(format, y), out = empty_maps(x, format);
  on_device("scfm", x, [&](cudaStream_t stream) {
    return cuda::scfm(type_of(x), shape, in.const_data_ptr(), small.const_data_ptr(), out.mutable_data_ptr(), stream);
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
  on_device(op, x, [&](cudaStream_t stream) {
    return cuda::scfm_backward(type_of(x), shape, g.const_data_ptr(), in.const_data_ptr(), small.const_data_ptr(),
                               gx.mutable_data_ptr(), gy.mutable_data_ptr(), stream);
  });
  return {gx, gy};
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("scfm", TORCH_BOX(&scfm));
  m.impl("scfm_backward", TORCH_BOX(&scfm_backward));
}

}  // namespace sodfast
