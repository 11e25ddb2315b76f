// torch.ops.sodfast.goctconv_dilated and its gradients on CUDA.
#include "bind/cuda.h"
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
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::dilated(type_of(xs[0]), shape, read(in).data(), read(w).data(), b.get(), a.get(), write(out).data(),
                         stream);
  });
  return out;
}

Tensors goctconv_dilated_grad_input(const Tensors& grads, const Tensors& weights, const std::vector<int64_t>& dilations,
                                    const std::vector<int64_t>& out_channels) {
  const char* op = "goctconv_dilated_grad_input";
  const DilatedShape shape = shape_for(op, grads, false, weights, dilations, out_channels);
  const Tensors g = contiguous_all(grads), w = contiguous_all(weights), out = empty_pyramid(grads[0], shape.in);
  on_device(op, grads[0], [&](cudaStream_t stream) {
    return cuda::dilated_grad_input(type_of(grads[0]), shape, read(g).data(), read(w).data(), write(out).data(),
                                    stream);
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
  const Tensor sums = workspace(xs[0], cuda::dilated_grad_weight_workspace(type_of(xs[0]), shape));
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::dilated_grad_weight(type_of(xs[0]), shape, read(g).data(), read(in).data(), write(out).data(),
                                     sums.mutable_data_ptr(), stream);
  });
  return out;
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("goctconv_dilated", TORCH_BOX(&goctconv_dilated));
  m.impl("goctconv_dilated_grad_input", TORCH_BOX(&goctconv_dilated_grad_input));
  m.impl("goctconv_dilated_grad_weight", TORCH_BOX(&goctconv_dilated_grad_weight));
}

}  // namespace sodfast
