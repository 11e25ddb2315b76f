// torch.ops.sodfast.boundary and structure_polishing_sums, and their gradients, on the CPU.
#include "bind/cpu.h"

namespace sodfast {
namespace {

BoundaryShape shape_of_maps(const char* op, const char* name, const Tensor& z, int64_t k, int64_t thin) {
  check(z.is_cpu(), op, name, " must be on the CPU");
  check(z.scalar_type() == ScalarType::Float || z.scalar_type() == ScalarType::Double, op, name,
        " must be float32 or float64");
  check(z.dim() == 4, op, name, " must have 4 dimensions (B, C, H, W), got ", shape_of(z));
  check(z.size(2) > 0 && z.size(3) > 0, op, name, " has an empty size: ", shape_of(z));
  check(k >= 1 && k <= 31 && k % 2 == 1, op, "k must be odd and from 1 to 31, got ", k);
  check(thin >= 1 && thin <= 3, op, "thin must be 1, 2 or 3, got ", thin);
  return {z.size(0) * z.size(1), z.size(2), z.size(3), k, static_cast<int>(thin)};
}

void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_like(op, name, t, like);
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  check(same, op, name, " must have shape ", shape_of(like), ", got ", shape_of(t));
}

Tensor empty_maps(const Tensor& like) {
  return empty_for(like, {like.size(0), like.size(1), like.size(2), like.size(3)});
}

Tensor boundary(const Tensor& z, int64_t k, int64_t thin) {
  const BoundaryShape shape = shape_of_maps("boundary", "z", z, k, thin);
  const Tensor in = torch::stable::contiguous(z), out = empty_maps(z);
  for_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().boundary(shape, read<T>(in), write<T>(out), torch_threads());
  });
  return out;
}

Tensor boundary_backward(const Tensor& grad, const Tensor& z, int64_t k, int64_t thin) {
  const char* op = "boundary_backward";
  const BoundaryShape shape = shape_of_maps(op, "z", z, k, thin);
  check_same_shape(op, "grad", grad, z);
  const Tensor g = torch::stable::contiguous(grad), in = torch::stable::contiguous(z), out = empty_maps(z);
  for_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().boundary_backward(shape, read<T>(g), read<T>(in), write<T>(out), torch_threads());
  });
  return out;
}

BoundaryShape shape_of_loss(const char* op, const Tensor& logits, const Tensor& truth, int64_t k) {
  const BoundaryShape shape = shape_of_maps(op, "logits", logits, k, thin_erosion);
  check(logits.size(1) == 1, op, "logits must have shape (B, 1, H, W), got ", shape_of(logits));
  check_same_shape(op, "truth", truth, logits);
  return shape;
}

Tensor structure_polishing_sums(const Tensor& logits, const Tensor& truth, int64_t k) {
  const BoundaryShape shape = shape_of_loss("structure_polishing_sums", logits, truth, k);
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
  const BoundaryShape shape = shape_of_loss(op, logits, truth, k);
  check_like(op, "grad", grad, logits);
  check(grad.dim() == 3 && grad.size(0) == shape.planes && grad.size(1) == 2 && grad.size(2) == 3, op,
        "grad must have shape (", shape.planes, ", 2, 3), got ", shape_of(grad));
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
