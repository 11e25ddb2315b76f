// torch.ops.sodfast.goctconv_norm_act, its gradient, and the update of the running statistics on CUDA. Parameters and
// statistics may stay float32 beside half-precision maps, as under autocast.
#include "bind/cuda.h"
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
  const Tensor mean = empty_for(weight, {n}), var = empty_for(weight, {n}), means = empty_for(weight, {maps.batch, n});
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  const cuda::Type type = type_of(xs[0]);
  const Tensor partial = workspace(xs[0], training && !given.has_value() ? cuda::norm_act_workspace(type, maps) : 0);
  on_device(op, xs[0], [&](cudaStream_t stream) {
    const auto* of_xs = given.has_value() ? static_cast<const double*>(given->const_data_ptr()) : nullptr;
    return cuda::norm_act(type, maps, read(in).data(), {read_vector(v[0]), read_vector(v[1]), read_vector(v[2])},
                          read_vector(v[3]), read_vector(v[4]), of_xs, eps, training, write_vector(mean),
                          write_vector(var), write(out).data(), write_vector(means), partial.mutable_data_ptr(),
                          stream);
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
  const Tensor gweight = empty_for(weight, {n}), gbias = empty_for(weight, {n}), gslope = empty_for(weight, {n});
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  const cuda::Type type = type_of(xs[0]);
  const Tensor partial = workspace(xs[0], cuda::norm_act_backward_workspace(type, maps));
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::norm_act_backward(type, maps, read(g).data(), read(in).data(),
                                   {read_vector(v[0]), read_vector(v[1]), read_vector(v[2])}, read_vector(v[3]),
                                   read_vector(v[4]), eps, training, write(out).data(), write_vector(gweight),
                                   write_vector(gbias), write_vector(gslope), partial.mutable_data_ptr(), stream);
  });
  return {out, gweight, gbias, gslope};
}

void goctconv_update_stats_(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var,
                            const std::vector<int64_t>& channels, const std::vector<int64_t>& counts, double momentum) {
  const char* op = "goctconv_update_stats_";
  check(channels.size() == counts.size(), op, "channels and counts must have one number per scale, got ",
        channels.size(), " and ", counts.size());
  check(channels.size() <= max_scales, op, "channels must hold at most ", max_scales, " scales, got ", channels.size());
  cuda::StatisticsUpdate update;
  update.scales = static_cast<int>(channels.size()), update.momentum = momentum;
  int64_t n = 0;
  for (int s = 0; s < update.scales; ++s) {
    check(channels[s] >= 0 && channels[s] <= running_mean.numel(), op, "channels must be 0 to ", running_mean.numel(),
          ", got ", channels[s]);
    check(counts[s] >= 0, op, "counts must not be negative, got ", counts[s]);
    update.channels[s] = channels[s], update.counts[s] = counts[s];
    n += channels[s];
  }
  check(is_known(running_mean.scalar_type()), op, "running_mean must be ", known_dtypes);
  check_vector(op, "running_mean", running_mean, n, running_mean);
  check_vector(op, "running_var", running_var, n, running_mean);
  check_vector(op, "mean", mean, n, running_mean);
  check_vector(op, "var", var, n, running_mean);
  check(running_mean.is_contiguous() && running_var.is_contiguous(), op, "running statistics must be contiguous");
  const Tensor m = torch::stable::contiguous(mean), v = torch::stable::contiguous(var);
  on_device(op, running_mean, [&](cudaStream_t stream) {
    return cuda::update_stats(update, write_vector(running_mean), write_vector(running_var), read_vector(m),
                              read_vector(v), stream);
  });
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("goctconv_norm_act", TORCH_BOX(&goctconv_norm_act));
  m.impl("goctconv_norm_act_backward", TORCH_BOX(&goctconv_norm_act_backward));
  m.impl("goctconv_update_stats_", TORCH_BOX(&goctconv_update_stats_));
}

}  // namespace sodfast
