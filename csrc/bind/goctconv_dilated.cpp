// torch.ops.sodfast.goctconv_dilated and its gradients on the CPU.
#include "bind/cpu.h"
#include "bind/goctconv_dilated.h"

namespace sodfast {
namespace {

Tensors goctconv_dilated(const Tensors& xs, const Tensors& weights, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& slope, const std::vector<int64_t>& dilations,
                         const std::vector<int64_t>& out_channels) {
  const char* op = "goctconv_dilated";
  const DilatedShape shape = shape_for(op, xs, true, weights, dilations, out_channels);
  const Optional b(op, "bias", bias, shape.out.total(), xs[0]), a(op, "slope", slope, shape.out.total(), xs[0]);
  const Tensors in = contiguous_all(xs), w = contiguous_all(weights), out = empty_pyramid(xs[0], shape.out);
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dilated(shape, read<T>(in).data(), read<T>(w).data(), b.get<T>(), a.get<T>(), write<T>(out).data(),
                         torch_threads());
  });
  return out;
}

Tensors goctconv_dilated_grad_input(const Tensors& grads, const Tensors& weights, const std::vector<int64_t>& dilations,
                                    const std::vector<int64_t>& out_channels) {
  const DilatedShape shape = shape_for("goctconv_dilated_grad_input", grads, false, weights, dilations, out_channels);
  const Tensors g = contiguous_all(grads), w = contiguous_all(weights), out = empty_pyramid(grads[0], shape.in);
  for_dtype(grads[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dilated_grad_input(shape, read<T>(g).data(), read<T>(w).data(), write<T>(out).data(), torch_threads());
  });
  return out;
}

Tensors goctconv_dilated_grad_weight(const Tensors& grads, const Tensors& xs, const Tensors& weights,
                                     const std::vector<int64_t>& dilations, const std::vector<int64_t>& out_channels) {
  const char* op = "goctconv_dilated_grad_weight";
  const DilatedShape shape = shape_for(op, xs, true, weights, dilations, out_channels);
  for (const Tensor& g : grads) check_like(op, "grads", g, xs[0]);
  check_pyramid(op, "grads", grads, shape.out);
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs);
  Tensors out;
  for (const Tensor& w : weights) out.push_back(empty_for(w, {w.size(0), w.size(1), 3, 3}));
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dilated_grad_weight(shape, read<T>(g).data(), read<T>(in).data(), write<T>(out).data(),
                                     torch_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("goctconv_dilated", TORCH_BOX(&goctconv_dilated));
  m.impl("goctconv_dilated_grad_input", TORCH_BOX(&goctconv_dilated_grad_input));
  m.impl("goctconv_dilated_grad_weight", TORCH_BOX(&goctconv_dilated_grad_weight));
}

}  // namespace sodfast
