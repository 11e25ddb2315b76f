// torch.ops.sodfast.goctconv and its gradients on the CPU.
#include "bind/cpu.h"
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
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().goctconv(shape, read<T>(in).data(), read<T>(w), b.get<T>(), a.get<T>(), write<T>(out).data(),
                          torch_threads());
  });
  return out;
}

Tensors goctconv_grad_input(const Tensors& grads, const Tensors& xs, const Tensor& weight, int64_t stride) {
  const GOctConvShape shape = shape_of_gradient("goctconv_grad_input", grads, xs, weight, stride);
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs), out = empty_pyramid(xs[0], shape.in);
  const Tensor w = torch::stable::contiguous(weight);
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().goctconv_grad_input(shape, read<T>(g).data(), read<T>(in).data(), read<T>(w), write<T>(out).data(),
                                     torch_threads());
  });
  return out;
}

Tensor goctconv_grad_weight(const Tensors& grads, const Tensors& xs, const Tensor& weight, int64_t stride) {
  const GOctConvShape shape = shape_of_gradient("goctconv_grad_weight", grads, xs, weight, stride);
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs);
  const Tensor out = empty_for(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)});
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().goctconv_grad_weight(shape, read<T>(g).data(), read<T>(in).data(), write<T>(out), torch_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("goctconv", TORCH_BOX(&goctconv));
  m.impl("goctconv_grad_input", TORCH_BOX(&goctconv_grad_input));
  m.impl("goctconv_grad_weight", TORCH_BOX(&goctconv_grad_weight));
}

}  // namespace sodfast
