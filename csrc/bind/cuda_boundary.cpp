// torch.ops.sodfast.boundary and structure_polishing_sums, and their gradients, on CUDA.
#include "bind/cuda.h"  // first: it says which library is compiled

#include "bind/boundary.h"

namespace sodfast {
namespace {

Tensor boundary(const Tensor& z, int64_t k, int64_t thin) {
  const BoundaryShape shape = boundary_shape("boundary", "z", z, k, thin);
  const Tensor in = torch::stable::contiguous(z), out = empty_maps(z);
  on_device("boundary", z, [&](cudaStream_t stream) {
    return cuda::boundary(type_of(z), shape, in.const_data_ptr(), out.mutable_data_ptr(), stream);
  });
  return out;
}

Tensor boundary_backward(const Tensor& grad, const Tensor& z, int64_t k, int64_t thin) {
  const char* op = "boundary_backward";
  const BoundaryShape shape = boundary_shape(op, "z", z, k, thin);
  check_same_shape(op, "grad", grad, z);
  const Tensor g = torch::stable::contiguous(grad), in = torch::stable::contiguous(z), out = empty_maps(z),
               places = workspace(z, cuda::boundary_backward_workspace(shape));
  on_device(op, z, [&](cudaStream_t stream) {
    return cuda::boundary_backward(type_of(z), shape, g.const_data_ptr(), in.const_data_ptr(), out.mutable_data_ptr(),
                                   places.mutable_data_ptr(), stream);
  });
  return out;
}

Tensor structure_polishing_sums(const Tensor& logits, const Tensor& truth, int64_t k) {
  const char* op = "structure_polishing_sums";
  const BoundaryShape shape = loss_shape(op, logits, truth, k);
  const Tensor in = torch::stable::contiguous(logits), g = torch::stable::contiguous(truth),
               out = empty_for(logits, {shape.planes, 2, 3}),
               partial = workspace(logits, cuda::structure_polishing_sums_workspace(shape));
  on_device(op, logits, [&](cudaStream_t stream) {
    return cuda::structure_polishing_sums(type_of(logits), shape, in.const_data_ptr(), g.const_data_ptr(),
                                          out.mutable_data_ptr(), partial.mutable_data_ptr(), stream);
  });
  return out;
}

Tensor structure_polishing_sums_backward(const Tensor& grad, const Tensor& logits, const Tensor& truth, int64_t k) {
  const char* op = "structure_polishing_sums_backward";
  const BoundaryShape shape = loss_shape(op, logits, truth, k);
  check_grad_of_sums(op, grad, shape, logits);
  const Tensor of_sums = torch::stable::contiguous(grad), in = torch::stable::contiguous(logits),
               g = torch::stable::contiguous(truth), out = empty_maps(logits),
               places = workspace(logits, cuda::structure_polishing_sums_backward_workspace(type_of(logits), shape));
  on_device(op, logits, [&](cudaStream_t stream) {
    return cuda::structure_polishing_sums_backward(type_of(logits), shape, of_sums.const_data_ptr(),
                                                   in.const_data_ptr(), g.const_data_ptr(), out.mutable_data_ptr(),
                                                   places.mutable_data_ptr(), stream);
  });
  return out;
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) {
  m.impl("boundary", TORCH_BOX(&boundary));
  m.impl("boundary_backward", TORCH_BOX(&boundary_backward));
  m.impl("structure_polishing_sums", TORCH_BOX(&structure_polishing_sums));
  m.impl("structure_polishing_sums_backward", TORCH_BOX(&structure_polishing_sums_backward));
}

}  // namespace sodfast
