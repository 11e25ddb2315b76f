// torch.ops.sodfast.dkd_theta, dkd_loss and its gradient on CUDA.
#include <tuple>

#include "bind/cuda.h"
#include "bind/dkd.h"

namespace sodfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> dkd_theta(const Tensor& student, const Tensor& teacher, const Tensor& truth,
                                             double p, double threshold, double epsilon) {
  const char* op = "dkd_theta";
  const DkdMaps maps(op, student, teacher, truth);
  const DkdRule rule = dkd_rule(op, p, threshold, epsilon);
  const Tensor theta = empty_for(student, {maps.shape.images}), alpha = empty_for(student, {maps.shape.images}),
               beta = empty_for(student, {maps.shape.images});
  const Tensor partial = workspace(student, cuda::dkd_workspace(maps.shape));
  on_device(op, student, [&](cudaStream_t stream) {
    return cuda::dkd_theta(type_of(student), maps.shape, maps.student.const_data_ptr(), maps.teacher.const_data_ptr(),
                           maps.truth.const_data_ptr(), rule, theta.mutable_data_ptr(), alpha.mutable_data_ptr(),
                           beta.mutable_data_ptr(), partial.mutable_data_ptr(), stream);
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
               gradient = with_gradient ? empty_maps(student) : empty_for(student, {0}),
               partial = workspace(student, cuda::dkd_workspace(maps.shape));
  on_device(op, student, [&](cudaStream_t stream) {
    return cuda::dkd_loss(type_of(student), maps.shape, maps.student.const_data_ptr(), maps.teacher.const_data_ptr(),
                          maps.truth.const_data_ptr(), weight.const_data_ptr(), temperature, kl_factor,
                          loss.mutable_data_ptr(), with_gradient ? gradient.mutable_data_ptr() : nullptr,
                          partial.mutable_data_ptr(), stream);
  });
  return {loss, gradient};
}

Tensor dkd_loss_backward(const Tensor& grad, const Tensor& gradient) {
  const char* op = "dkd_loss_backward";
  const DkdShape shape = shape_of_map(op, "gradient", gradient);
  check_vector(op, "grad", grad, shape.images, gradient);
  const Tensor g = torch::stable::contiguous(grad), from = torch::stable::contiguous(gradient),
               out = empty_maps(gradient);
  on_device(op, gradient, [&](cudaStream_t stream) {
    return cuda::dkd_loss_backward(type_of(gradient), shape, g.const_data_ptr(), from.const_data_ptr(),
                                   out.mutable_data_ptr(), stream);
  });
  return out;
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("dkd_theta", TORCH_BOX(&dkd_theta));
  m.impl("dkd_loss", TORCH_BOX(&dkd_loss));
  m.impl("dkd_loss_backward", TORCH_BOX(&dkd_loss_backward));
}

}  // namespace sodfast
