// torch.ops.sodfast.goctconv_norm_depthwise and its gradients on the CPU.
#include <tuple>

#include "bind/cpu.h"
#include "bind/norm_act.h"

namespace sodfast {
namespace {

using Result = std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor>;

Result goctconv_norm_depthwise(const Tensors& xs, const Tensor& weight, const Tensor& bias, const Tensor& slope,
                               const Tensor& running_mean, const Tensor& running_var, const Tensor& kernel,
                               const std::optional<Tensor>& moments, bool training, double eps) {
  const char* op = "goctconv_norm_depthwise";
  const Pyramid maps = pyramid_of(op, "xs", xs);
  const int64_t n = maps.total();
  const Tensors v = norm_act_vectors(op, {"weight", "bias", "slope", "running_mean", "running_var"},
                                     {&weight, &bias, &slope, &running_mean, &running_var}, n, xs[0]);
  const Tensor w = checked_kernel(op, kernel, n, weight);
  const std::optional<Tensor> given = checked_moments(op, moments, maps, xs[0], training);
  const Tensor mean = torch::stable::clone(v[3]), var = torch::stable::clone(v[4]);  // overwritten in training
  const Tensor means = empty_for(xs[0], {maps.batch, n}), out_moments = empty_moments(xs[0], maps, training);
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().norm_depthwise(maps, read<T>(in).data(), read<T>(v[0]), read<T>(v[1]), read<T>(v[2]), read<T>(w),
                                read<double>(given), static_cast<T>(eps), training, write<T>(mean), write<T>(var),
                                write<T>(out).data(), write<T>(means), write<double>(out_moments), torch_threads());
  });
  return {out, mean, var, means, out_moments};
}

Result goctconv_norm_depthwise_backward(const Tensors& grads, const Tensors& xs, const Tensor& weight,
                                        const Tensor& bias, const Tensor& slope, const Tensor& mean, const Tensor& var,
                                        const Tensor& kernel, bool training, double eps) {
  const char* op = "goctconv_norm_depthwise_backward";
  const Pyramid maps = pyramid_of(op, "xs", xs);
  for (const Tensor& g : grads) check_like(op, "grads", g, xs[0]);
  check_pyramid(op, "grads", grads, maps);
  const int64_t n = maps.total();
  const Tensors v =
      norm_act_vectors(op, {"weight", "bias", "slope", "mean", "var"}, {&weight, &bias, &slope, &mean, &var}, n, xs[0]);
  const Tensor w = checked_kernel(op, kernel, n, weight);
  const Tensor gweight = empty_for(xs[0], {n}), gbias = empty_for(xs[0], {n}), gslope = empty_for(xs[0], {n}),
               gkernel = empty_for(xs[0], {n, 1, 3, 3});
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().norm_depthwise_backward(maps, read<T>(g).data(), read<T>(in).data(), read<T>(v[0]), read<T>(v[1]),
                                         read<T>(v[2]), read<T>(v[3]), read<T>(v[4]), read<T>(w), static_cast<T>(eps),
                                         training, write<T>(out).data(), write<T>(gweight), write<T>(gbias),
                                         write<T>(gslope), write<T>(gkernel), torch_threads());
  });
  return {out, gweight, gbias, gslope, gkernel};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("goctconv_norm_depthwise", TORCH_BOX(&goctconv_norm_depthwise));
  m.impl("goctconv_norm_depthwise_backward", TORCH_BOX(&goctconv_norm_depthwise_backward));
}

}  // namespace sodfast
