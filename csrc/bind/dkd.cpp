// torch.ops.sodfast.dkd_sums, dkd_loss and its gradient, on the CPU.
#include "bind/dkd.h"

#include <tuple>

#include "bind/cpu.h"

namespace sodfast {
namespace {

Tensor dkd_sums(const Tensor& student, const Tensor& teacher, const Tensor& truth) {
  const DkdMaps maps("dkd_sums", student, teacher, truth);
  const Tensor out = empty_for(student, {maps.shape.images, 2, 2});
  for_dtype(student, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dkd_sums(maps.shape, read<T>(maps.student), read<T>(maps.teacher), read<T>(maps.truth), write<T>(out),
                          torch_threads());
  });
  return out;
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
  m.impl("dkd_sums", TORCH_BOX(&dkd_sums));
  m.impl("dkd_loss", TORCH_BOX(&dkd_loss));
  m.impl("dkd_loss_backward", TORCH_BOX(&dkd_loss_backward));
}

}  // namespace sodfast
