// torch.ops.sodfast.goctconv and its gradients on CUDA.
#include <tuple>

#include "bind/cuda.h"
#include "bind/goctconv.h"

namespace sodfast {
namespace {

Tensors goctconv(const Tensors& xs, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& slope, const std::vector<int64_t>& out_channels, int64_t stride) {
  const char* op = "goctconv";
  const GOctConvShape shape =
      shape_for(op, xs, weight, out_channels.data(), static_cast<int64_t>(out_channels.size()), stride);
  const Optional b(op, "bias", bias, shape.out.total(), xs[0]), a(op, "slope", slope, shape.out.total(), xs[0]);
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], shape.out);
  const Tensor w = torch::stable::contiguous(weight);
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::goctconv(type_of(xs[0]), shape, read(in).data(), w.const_data_ptr(), b.get(), a.get(),
                          write(out).data(), stream);
  });
  return out;
}

std::tuple<Tensors, Tensor> goctconv_measured(const Tensors& xs, const Tensor& weight,
                                              const std::vector<int64_t>& out_channels, int64_t stride) {
  const char* op = "goctconv_measured";
  const GOctConvShape shape =
      shape_for(op, xs, weight, out_channels.data(), static_cast<int64_t>(out_channels.size()), stride);
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], shape.out);
  const Tensor w = torch::stable::contiguous(weight);
  const std::vector<int64_t> size{shape.out.total(), shape.out.batch, 2};
  const Tensor moments = torch::stable::new_empty(xs[0], size, ScalarType::Double);
  const Tensor tiles = workspace(xs[0], cuda::goctconv_measured_workspace(shape));
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::goctconv_measured(type_of(xs[0]), shape, read(in).data(), w.const_data_ptr(), write(out).data(),
                                   static_cast<double*>(moments.mutable_data_ptr()), tiles.mutable_data_ptr(), stream);
  });
  return {out, moments};
}

Tensors goctconv_grad_input(const Tensors& grads, const Tensors& xs, const Tensor& weight, int64_t stride) {
  const char* op = "goctconv_grad_input";
  const GOctConvShape shape = shape_of_gradient(op, grads, xs, weight, stride);
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs), out = empty_pyramid(xs[0], shape.in);
  const Tensor w = torch::stable::contiguous(weight);
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::goctconv_grad_input(type_of(xs[0]), shape, read(g).data(), read(in).data(), w.const_data_ptr(),
                                     write(out).data(), stream);
  });
  return out;
}

Tensor goctconv_grad_weight(const Tensors& grads, const Tensors& xs, const Tensor& weight, int64_t stride) {
  const char* op = "goctconv_grad_weight";
  const GOctConvShape shape = shape_of_gradient(op, grads, xs, weight, stride);
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs);
  const Tensor out = empty_for(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  const Tensor sums = workspace(xs[0], cuda::goctconv_grad_weight_workspace(type_of(xs[0]), shape));
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::goctconv_grad_weight(type_of(xs[0]), shape, read(g).data(), read(in).data(), out.mutable_data_ptr(),
                                      sums.mutable_data_ptr(), stream);
  });
  return out;
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("goctconv", TORCH_BOX(&goctconv));
  m.impl("goctconv_measured", TORCH_BOX(&goctconv_measured));
  m.impl("goctconv_grad_input", TORCH_BOX(&goctconv_grad_input));
  m.impl("goctconv_grad_weight", TORCH_BOX(&goctconv_grad_weight));
}

}  // namespace sodfast
