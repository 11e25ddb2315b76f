// torch.ops.sodfast.goctconv_depthwise and its gradients on the CPU.
#include "bind/cpu.h"
#include "bind/goctconv_depthwise.h"

namespace sodfast {
namespace {

Tensors run(const DepthwiseShape& shape, const Tensors& xs, const Tensor& weight, const Optional& bias,
            const Optional& slope, bool flip) {
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], shape.maps);
  const Tensor w = torch::stable::contiguous(weight);
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().depthwise(shape, read<T>(in).data(), read<T>(w), bias.get<T>(), slope.get<T>(), flip,
                           write<T>(out).data(), torch_threads());
  });
  return out;
}

Tensors goctconv_depthwise(const Tensors& xs, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& slope, int64_t dilation) {
  const char* op = "goctconv_depthwise";
  const DepthwiseShape shape = shape_for(op, "xs", xs, weight, dilation);
  const int64_t n = shape.maps.total();
  return run(shape, xs, weight, Optional(op, "bias", bias, n, xs[0]), Optional(op, "slope", slope, n, xs[0]), false);
}

Tensors goctconv_depthwise_grad_input(const Tensors& grads, const Tensor& weight, int64_t dilation) {
  const char* op = "goctconv_depthwise_grad_input";
  const DepthwiseShape shape = shape_for(op, "grads", grads, weight, dilation);
  const Optional none(op, "", std::nullopt, 0, weight);
  return run(shape, grads, weight, none, none, true);
}

Tensor goctconv_depthwise_grad_weight(const Tensors& grads, const Tensors& xs, const Tensor& weight, int64_t dilation) {
  const char* op = "goctconv_depthwise_grad_weight";
  const DepthwiseShape shape = shape_for(op, "xs", xs, weight, dilation);
  for (const Tensor& g : grads) check_like(op, "grads", g, xs[0]);
  check_pyramid(op, "grads", grads, shape.maps);
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs);
  const Tensor out = empty_for(weight, {shape.maps.total(), 1, 3, 3});
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().depthwise_grad_weight(shape, read<T>(g).data(), read<T>(in).data(), write<T>(out), torch_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("goctconv_depthwise", TORCH_BOX(&goctconv_depthwise));
  m.impl("goctconv_depthwise_grad_input", TORCH_BOX(&goctconv_depthwise_grad_input));
  m.impl("goctconv_depthwise_grad_weight", TORCH_BOX(&goctconv_depthwise_grad_weight));
}

}  // namespace sodfast
