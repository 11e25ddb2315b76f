// torch.ops.sodfast.goctconv_depthwise and its gradients on CUDA.
#include "bind/cuda.h"
#include "bind/goctconv_depthwise.h"

namespace sodfast {
namespace {

Tensors run(const char* op, const DepthwiseShape& shape, const Tensors& xs, const Tensor& weight, const Optional& bias,
            const Optional& slope, bool flip) {
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], shape.maps);
  const Tensor w = torch::stable::contiguous(weight);
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::depthwise(type_of(xs[0]), shape, read(in).data(), w.const_data_ptr(), bias.get(), slope.get(), flip,
                           write(out).data(), stream);
  });
  return out;
}

Tensors goctconv_depthwise(const Tensors& xs, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& slope, int64_t dilation) {
  const char* op = "goctconv_depthwise";
  const DepthwiseShape shape = shape_for(op, "xs", xs, weight, dilation);
  const int64_t n = shape.maps.total();
  const Optional b(op, "bias", bias, n, xs[0]), a(op, "slope", slope, n, xs[0]);
  return run(op, shape, xs, weight, b, a, false);
}

Tensors goctconv_depthwise_grad_input(const Tensors& grads, const Tensor& weight, int64_t dilation) {
  const char* op = "goctconv_depthwise_grad_input";
  const DepthwiseShape shape = shape_for(op, "grads", grads, weight, dilation);
  const Optional none(op, "", std::nullopt, 0, weight);
  return run(op, shape, grads, weight, none, none, true);
}

Tensor goctconv_depthwise_grad_weight(const Tensors& grads, const Tensors& xs, const Tensor& weight, int64_t dilation) {
  const char* op = "goctconv_depthwise_grad_weight";
  const DepthwiseShape shape = shape_for(op, "xs", xs, weight, dilation);
  for (const Tensor& g : grads) check_like(op, "grads", g, xs[0]);
  check_pyramid(op, "grads", grads, shape.maps);
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs);
  const Tensor out = empty_for(weight, {shape.maps.total(), 1, 3, 3});
  const Tensor sums = workspace(xs[0], cuda::depthwise_grad_weight_workspace(type_of(xs[0]), shape));
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::depthwise_grad_weight(type_of(xs[0]), shape, read(g).data(), read(in).data(), out.mutable_data_ptr(),
                                       sums.mutable_data_ptr(), stream);
  });
  return out;
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("goctconv_depthwise", TORCH_BOX(&goctconv_depthwise));
  m.impl("goctconv_depthwise_grad_input", TORCH_BOX(&goctconv_depthwise_grad_input));
  m.impl("goctconv_depthwise_grad_weight", TORCH_BOX(&goctconv_depthwise_grad_weight));
}

}  // namespace sodfast
