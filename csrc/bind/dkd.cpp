// torch.ops.sodfast.dkd_sums, dkd_loss and its gradient, on the CPU.
#include <cmath>
#include <tuple>

#include "bind/cpu.h"

namespace sodfast {
namespace {

DkdShape shape_of_map(const char* op, const char* name, const Tensor& x) {
  check(x.is_cpu(), op, name, " must be on the CPU");
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op, name,
        " must be float32 or float64");
  check(x.dim() == 4 && x.size(1) == 1, op, name, " must have shape (B, 1, H, W), got ", shape_of(x));
  check(x.size(2) > 0 && x.size(3) > 0, op, name, " has an empty size: ", shape_of(x));
  return {x.size(0), x.size(2) * x.size(3)};
}

void check_same_map(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  check_like(op, name, x, like);
  bool same = x.dim() == 4;
  for (int64_t i = 0; same && i < 4; ++i) same = x.size(i) == like.size(i);
  check(same, op, name, " must have shape ", shape_of(like), ", got ", shape_of(x));
}

DkdShape shape_of_maps(const char* op, const Tensor& student, const Tensor& teacher, const Tensor& truth) {
  const DkdShape shape = shape_of_map(op, "student_logits", student);
  check_same_map(op, "teacher_logits", teacher, student);
  check_same_map(op, "truth", truth, student);
  return shape;
}

Tensor empty_map(const Tensor& like) { return empty_for(like, {like.size(0), 1, like.size(2), like.size(3)}); }

Tensor dkd_sums(const Tensor& student, const Tensor& teacher, const Tensor& truth) {
  const DkdShape shape = shape_of_maps("dkd_sums", student, teacher, truth);
  const Tensor s = torch::stable::contiguous(student), t = torch::stable::contiguous(teacher),
               g = torch::stable::contiguous(truth), out = empty_for(student, {shape.images, 2, 2});
  for_dtype(student, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dkd_sums(shape, read<T>(s), read<T>(t), read<T>(g), write<T>(out), torch_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> dkd_loss(const Tensor& student, const Tensor& teacher, const Tensor& truth,
                                    const Tensor& theta, double temperature, double kl_factor, bool with_gradient) {
  const char* op = "dkd_loss";
  const DkdShape shape = shape_of_maps(op, student, teacher, truth);
  check_vector(op, "theta", theta, shape.images, student);
  check(temperature > 0 && std::isfinite(temperature), op, "temperature must be above 0 and finite");
  check(kl_factor >= 0 && std::isfinite(kl_factor), op, "kl_factor must be finite and from 0 on");
  const Tensor s = torch::stable::contiguous(student), t = torch::stable::contiguous(teacher),
               g = torch::stable::contiguous(truth), w = torch::stable::contiguous(theta),
               loss = empty_for(student, {shape.images}),
               gradient = with_gradient ? empty_map(student) : empty_for(student, {0});
  for_dtype(student, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().dkd_loss(shape, read<T>(s), read<T>(t), read<T>(g), read<T>(w), temperature, kl_factor, write<T>(loss),
                          with_gradient ? write<T>(gradient) : nullptr, torch_threads());
  });
  return {loss, gradient};
}

Tensor dkd_loss_backward(const Tensor& grad, const Tensor& gradient) {
  const char* op = "dkd_loss_backward";
  const DkdShape shape = shape_of_map(op, "gradient", gradient);
  check_vector(op, "grad", grad, shape.images, gradient);
  const Tensor g = torch::stable::contiguous(grad), from = torch::stable::contiguous(gradient),
               out = empty_map(gradient);
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
