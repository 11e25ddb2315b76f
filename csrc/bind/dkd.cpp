// torch.ops.sodfast.dkd_theta, dkd_loss and its gradient, on the CPU.
#include "bind/dkd.h"

#include <tuple>

#include "bind/cpu.h"

namespace sodfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> dkd_theta(const Tensor& student, const Tensor& teacher, const Tensor& truth,
                                             double p, double threshold, double epsilon) {
  const char* op = "dkd_theta";
  const DkdMaps maps(op, student, teacher, truth);
  const DkdRule rule = dkd_rule(op, p, threshold, epsilon);
  const Tensor theta = empty_for(student, {maps.shape.images}), alpha = empty_for(student, {maps.shape.images}),
               beta = empty_for(student, {maps.shape.images});
  for_dtype(student, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dkd_theta(maps.shape, read<T>(maps.student), read<T>(maps.teacher), read<T>(maps.truth), rule,
                           write<T>(theta), write<T>(alpha), write<T>(beta), torch_threads());
  });
  return {theta, alpha, beta};
}

std::tuple<Tensor, Tensor> dkd_loss(const Tensor& student, const Tensor& teacher, const Tensor& truth,
                                    const Tensor& theta, double temperature, double kl_factor, bool with_gradient) {
  const char* op = "dkd_loss";
  const DkdMaps maps(op, student, teacher, truth);
  check_vector(op, "theta", theta, maps.shape.images, student);
  check_dkd_numbers(op, temperature, kl_factor);
  const Tensor weight = torch::stable::contiguous(theta), loss = empty_for(student, {maps.shape.images}),
               gradient = with_gradient ? empty_maps(student) : empty_for(student, {0});
  for_dtype(student, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dkd_loss(maps.shape, read<T>(maps.student), read<T>(maps.teacher), read<T>(maps.truth),
                          read<T>(weight), temperature, kl_factor, write<T>(loss),
                          with_gradient ? write<T>(gradient) : nullptr, torch_threads());
  });
  return {loss, gradient};
}

Tensor dkd_loss_backward(const Tensor& grad, const Tensor& gradient) {
  const char* op = "dkd_loss_backward";
  const DkdShape shape = shape_of_map(op, "gradient", gradient);
  check_vector(op, "grad", grad, shape.images, gradient);
  const Tensor g = torch::stable::contiguous(grad), from = torch::stable::contiguous(gradient),
               out = empty_maps(gradient);
  for_dtype(gradient, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dkd_loss_backward(shape, read<T>(g), read<T>(from), write<T>(out), torch_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("dkd_theta", TORCH_BOX(&dkd_theta));
  m.impl("dkd_loss", TORCH_BOX(&dkd_loss));
  m.impl("dkd_loss_backward", TORCH_BOX(&dkd_loss_backward));
}

}  // namespace sodfast
