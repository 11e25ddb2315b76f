// torch.ops.sodfast.goctconv_dilated and its gradients on the CPU.
#include "bind/common.h"

namespace sodfast {
namespace {

// `known` is the side whose tensors are given (the input, or the output's gradient); the other follows from the
// weights.
DilatedShape shape_for(const char* op, const Tensors& xs, bool xs_are_inputs, const Tensors& weights,
                       const std::vector<int64_t>& dilations, const std::vector<int64_t>& out_channels) {
  DilatedShape shape;
  const Pyramid known = pyramid_of(op, xs_are_inputs ? "xs" : "grads", xs);
  Pyramid other = known;
  const size_t n = dilations.size();
  check(n >= 1 && n <= max_dilations, op, "dilations must name 1 to ", max_dilations, " branches, got ", n);
  check(weights.size() == xs.size(), op, "weights must hold one tensor per scale: ", xs.size(), ", got ",
        weights.size());
  check(out_channels.size() == n * xs.size(), op, "out_channels must hold scales x dilations = ", n * xs.size(),
        " numbers, got ", out_channels.size());
  shape.dilations = static_cast<int>(n);
  for (size_t d = 0; d < n; ++d) {
    check(dilations[d] >= 1, op, "dilations[", d, "] must be at least 1, got ", dilations[d]);
    shape.dilation[d] = dilations[d];
  }
  for (int s = 0; s < known.scales; ++s) {
    const Tensor& w = weights[s];
    check_like(op, "weights", w, xs[0]);
    check(w.dim() == 4, op, "weights[", s, "] must have 4 dimensions, got ", shape_of(w));
    int64_t outs = 0;
    for (size_t d = 0; d < n; ++d) {
      const int64_t o = out_channels[s * n + d];
      check(o >= 0 && o <= w.size(0), op, "out_channels must be 0 to the weight's ", w.size(0), " rows, got ", o);
      shape.branch[s][d] = o;
      outs += o;
    }
    check(w.size(0) == outs && w.size(xs_are_inputs ? 1 : 0) == known.channels[s] && w.size(2) == 3 && w.size(3) == 3,
          op, "weights[", s, "] must have shape (", outs, ", in, 3, 3) with ", known.channels[s],
          xs_are_inputs ? " inputs" : " outputs", ", got ", shape_of(w));
    other.channels[s] = xs_are_inputs ? outs : w.size(1);
  }
  shape.in = xs_are_inputs ? known : other;
  shape.out = xs_are_inputs ? other : known;
  return shape;
}

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
