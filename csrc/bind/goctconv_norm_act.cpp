// torch.ops.sodfast.goctconv_norm_act, its gradient, and the update of the running statistics on the CPU.
#include "bind/cpu.h"
#include "bind/norm_act.h"

namespace sodfast {
namespace {

std::tuple<Tensors, Tensor, Tensor, Tensor> goctconv_norm_act(const Tensors& xs, const Tensor& weight,
                                                              const Tensor& bias, const Tensor& slope,
                                                              const Tensor& running_mean, const Tensor& running_var,
                                                              bool training, double eps,
                                                              const std::optional<Tensor>& moments) {
  const char* op = "goctconv_norm_act";
  const Pyramid maps = pyramid_of(op, "xs", xs);
  const int64_t n = maps.total();
  const Tensors v = norm_act_vectors(op, {"weight", "bias", "slope", "running_mean", "running_var"},
                                     {&weight, &bias, &slope, &running_mean, &running_var}, n, xs[0]);
  const std::optional<Tensor> given = checked_moments(op, moments, maps, xs[0], training);
  const Tensor mean = torch::stable::clone(v[3]), var = torch::stable::clone(v[4]);  // overwritten in training
  const Tensor means = empty_for(xs[0], {maps.batch, n});
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().norm_act(maps, read<T>(in).data(), read<T>(v[0]), read<T>(v[1]), read<T>(v[2]), read<double>(given),
                          static_cast<T>(eps), training, write<T>(mean), write<T>(var), write<T>(out).data(),
                          write<T>(means), torch_threads());
  });
  return {out, mean, var, means};
}

std::tuple<Tensors, Tensor, Tensor, Tensor> goctconv_norm_act_backward(const Tensors& grads, const Tensors& xs,
                                                                       const Tensor& weight, const Tensor& bias,
                                                                       const Tensor& slope, const Tensor& mean,
                                                                       const Tensor& var, bool training, double eps) {
  const char* op = "goctconv_norm_act_backward";
  const Pyramid maps = pyramid_of(op, "xs", xs);
  for (const Tensor& g : grads) check_like(op, "grads", g, xs[0]);
  check_pyramid(op, "grads", grads, maps);
  const int64_t n = maps.total();
  const Tensors v =
      norm_act_vectors(op, {"weight", "bias", "slope", "mean", "var"}, {&weight, &bias, &slope, &mean, &var}, n, xs[0]);
  const Tensor gweight = empty_for(xs[0], {n}), gbias = empty_for(xs[0], {n}), gslope = empty_for(xs[0], {n});
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  for_dtype(xs[0], [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().norm_act_backward(maps, read<T>(g).data(), read<T>(in).data(), read<T>(v[0]), read<T>(v[1]),
                                   read<T>(v[2]), read<T>(v[3]), read<T>(v[4]), static_cast<T>(eps), training,
                                   write<T>(out).data(), write<T>(gweight), write<T>(gbias), write<T>(gslope),
                                   torch_threads());
  });
  return {out, gweight, gbias, gslope};
}

// running = (1 - momentum) · running + momentum · batch, the variance unbiased by n / (n - 1).
void goctconv_update_stats_(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var,
                            const std::vector<int64_t>& channels, const std::vector<int64_t>& counts, double momentum) {
  const char* op = "goctconv_update_stats_";
  int64_t n = 0;
  for (int64_t c : channels) {
    check(c >= 0 && c <= running_mean.numel(), op, "channels must be 0 to ", running_mean.numel(), ", got ", c);
    n += c;
  }
  check(channels.size() == counts.size(), op, "channels and counts must have one number per scale, got ",
        channels.size(), " and ", counts.size());
  for (int64_t c : counts) check(c >= 0, op, "counts must not be negative, got ", c);
  check(running_mean.scalar_type() == ScalarType::Float || running_mean.scalar_type() == ScalarType::Double, op,
        "running_mean must be float32 or float64");
  check_vector(op, "running_mean", running_mean, n, running_mean);
  check_vector(op, "running_var", running_var, n, running_mean);
  check_vector(op, "mean", mean, n, running_mean);
  check_vector(op, "var", var, n, running_mean);
  check(running_mean.is_contiguous() && running_var.is_contiguous(), op, "running statistics must be contiguous");
  const Tensor m = torch::stable::contiguous(mean), v = torch::stable::contiguous(var);
  for_dtype(running_mean, [&](auto zero) {
    using T = decltype(zero);
    T *rm = write<T>(running_mean), *rv = write<T>(running_var);
    const T *bm = read<T>(m), *bv = read<T>(v);
    int64_t i = 0;
    for (size_t s = 0; s < channels.size(); ++s) {
      const double count = static_cast<double>(counts[s]), unbiased = counts[s] > 1 ? count / (count - 1) : 1;
      for (int64_t c = 0; c < channels[s]; ++c, ++i) {
        if (counts[s] == 0) continue;
        rm[i] = static_cast<T>((1 - momentum) * rm[i] + momentum * bm[i]);
        rv[i] = static_cast<T>((1 - momentum) * rv[i] + momentum * unbiased * bv[i]);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("goctconv_norm_act", TORCH_BOX(&goctconv_norm_act));
  m.impl("goctconv_norm_act_backward", TORCH_BOX(&goctconv_norm_act_backward));
  m.impl("goctconv_update_stats_", TORCH_BOX(&goctconv_update_stats_));
}

}  // namespace sodfast
