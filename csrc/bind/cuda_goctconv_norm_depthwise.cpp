// torch.ops.sodfast.goctconv_norm_depthwise and its gradients on CUDA.
#include <tuple>

#include "bind/cuda.h"
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
  const Tensor mean = empty_for(weight, {n}), var = empty_for(weight, {n}), means = empty_for(weight, {maps.batch, n});
  const Tensor out_moments = empty_moments(xs[0], maps, training);
  const Tensors in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  const cuda::Type type = type_of(xs[0]);
  const Tensor partial =
      workspace(xs[0], training && !given.has_value() ? cuda::norm_depthwise_workspace(type, maps) : 0);
  on_device(op, xs[0], [&](cudaStream_t stream) {
    const auto* of_xs = given.has_value() ? static_cast<const double*>(given->const_data_ptr()) : nullptr;
    auto* of_ys = training ? static_cast<double*>(out_moments.mutable_data_ptr()) : nullptr;
    return cuda::norm_depthwise(type, maps, read(in).data(), {read_vector(v[0]), read_vector(v[1]), read_vector(v[2])},
                                read_vector(v[3]), read_vector(v[4]), read_vector(w), of_xs, eps, training,
                                write_vector(mean), write_vector(var), write(out).data(), write_vector(means), of_ys,
                                partial.mutable_data_ptr(), stream);
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
  const Tensor gweight = empty_for(weight, {n}), gbias = empty_for(weight, {n}), gslope = empty_for(weight, {n}),
               gkernel = empty_for(weight, {n, 1, 3, 3});
  const Tensors g = contiguous_all(grads), in = contiguous_all(xs), out = empty_pyramid(xs[0], maps);
  const cuda::Type type = type_of(xs[0]);
  const Tensor partial = workspace(xs[0], cuda::norm_depthwise_backward_workspace(type, maps));
  on_device(op, xs[0], [&](cudaStream_t stream) {
    return cuda::norm_depthwise_backward(
        type, maps, read(g).data(), read(in).data(), {read_vector(v[0]), read_vector(v[1]), read_vector(v[2])},
        read_vector(v[3]), read_vector(v[4]), read_vector(w), eps, training, write(out).data(), write_vector(gweight),
        write_vector(gbias), write_vector(gslope), write_vector(gkernel), partial.mutable_data_ptr(), stream);
  });
  return {out, gweight, gbias, gslope, gkernel};
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("goctconv_norm_depthwise", TORCH_BOX(&goctconv_norm_depthwise));
  m.impl("goctconv_norm_depthwise_backward", TORCH_BOX(&goctconv_norm_depthwise_backward));
}

}  // namespace sodfast
