// torch.ops.sodfast.boundary and structure_polishing_sums, and their gradients, on the CPU.
#include "bind/boundary.h"

#include "bind/cpu.h"

namespace sodfast {
namespace {

Tensor boundary(const Tensor& z, int64_t k, int64_t thin) {
  const BoundaryShape shape = boundary_shape("boundary", "z", z, k, thin);
  const Tensor in = torch::stable::contiguous(z), out = empty_maps(z);
  for_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().boundary(shape, read<T>(in), write<T>(out), torch_threads());
  });
  return out;
}

Tensor boundary_backward(const Tensor& grad, const Tensor& z, int64_t k, int64_t thin) {
  const char* op = "boundary_backward";
  const BoundaryShape shape = boundary_shape(op, "z", z, k, thin);
  check_same_shape(op, "grad", grad, z);
  const Tensor g = torch::stable::contiguous(grad), in = torch::stable::contiguous(z), out = empty_maps(z);
  for_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().boundary_backward(shape, read<T>(g), read<T>(in), write<T>(out), torch_threads());
  });
  return out;
}

Tensor structure_polishing_sums(const Tensor& logits, const Tensor& truth, int64_t k) {
  const BoundaryShape shape = loss_shape("structure_polishing_sums", logits, truth, k);
  const Tensor in = torch::stable::contiguous(logits), g = torch::stable::contiguous(truth);
  const Tensor out = empty_for(logits, {shape.planes, 2, 3});
  for_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().structure_polishing_sums(shape, read<T>(in), read<T>(g), write<T>(out), torch_threads());
  });
  return out;
}

Tensor structure_polishing_sums_backward(const Tensor& grad, const Tensor& logits, const Tensor& truth, int64_t k) {
  const char* op = "structure_polishing_sums_backward";
  const BoundaryShape shape = loss_shape(op, logits, truth, k);
  check_grad_of_sums(op, grad, shape, logits);
  const Tensor of_sums = torch::stable::contiguous(grad), in = torch::stable::contiguous(logits),
               g = torch::stable::contiguous(truth), out = empty_maps(logits);
  for_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().structure_polishing_sums_backward(shape, read<T>(of_sums), read<T>(in), read<T>(g), write<T>(out),
                                                   torch_threads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("boundary", TORCH_BOX(&boundary));
  m.impl("boundary_backward", TORCH_BOX(&boundary_backward));
  m.impl("structure_polishing_sums", TORCH_BOX(&structure_polishing_sums));
  m.impl("structure_polishing_sums_backward", TORCH_BOX(&structure_polishing_sums_backward));
}

}  // namespace sodfast
