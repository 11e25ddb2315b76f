// torch.ops.sodfast.ilblock on CUDA.
#include "bind/cuda.h"
#include "bind/goctconv.h"

namespace sodfast {
namespace {

// One launch where that is the faster way, otherwise the three layers one after the other.
Tensors ilblock(const Tensors& xs, const Tensors& weights, const Tensors& biases, const Tensors& slopes,
                const std::vector<int64_t>& out_channels, int64_t stride) {
  const char* op = "ilblock";
  check(weights.size() == 3 && biases.size() == 3 && slopes.size() == 3, op,
        "weights, biases and slopes must hold one tensor per layer, 3 each, got ", weights.size(), ", ", biases.size(),
        " and ", slopes.size());
  const GOctConvShape shape =
      shape_for(op, xs, weights[0], out_channels.data(), static_cast<int64_t>(out_channels.size()), stride);
  const int64_t n = shape.out.total();
  for (size_t l = 0; l < 3; ++l) {
    check_vector(op, "biases", biases[l], n, xs[0]);
    check_vector(op, "slopes", slopes[l], n, xs[0]);
    if (l == 0) continue;
    const Tensor& w = weights[l];
    check_like(op, "weights", w, xs[0]);
    check(w.dim() == 4 && w.size(0) == n && w.size(1) == 1 && w.size(2) == 3 && w.size(3) == 3, op, "weights[", l,
          "] must have shape (", n, ", 1, 3, 3) for these scales, got ", shape_of(w));
  }
  const Tensors in = contiguous_all(xs), w = contiguous_all(weights), b = contiguous_all(biases),
                a = contiguous_all(slopes), out = empty_pyramid(xs[0], shape.out);
  const auto type = type_of(xs[0]);
  if (cuda::ilblock_is_one_launch(shape)) {
    on_device(op, xs[0], [&](cudaStream_t stream) {
      return cuda::ilblock(type, shape, read(in).data(), read(w).data(), read(b).data(), read(a).data(),
                           write(out).data(), stream);
    });
    return out;
  }
  const Tensors between = empty_pyramid(xs[0], shape.out);
  const DepthwiseShape depthwise{shape.out, 1};
  const auto w_of = read(w), b_of = read(b), a_of = read(a);
  on_device(op, xs[0], [&](cudaStream_t stream) {
    cudaError_t error =
        cuda::goctconv(type, shape, read(in).data(), w_of[0], b_of[0], a_of[0], write(out).data(), stream);
    if (error == cudaSuccess)
      error = cuda::depthwise(type, depthwise, read(out).data(), w_of[1], b_of[1], a_of[1], false,
                              write(between).data(), stream);
    if (error == cudaSuccess)
      error = cuda::depthwise(type, depthwise, read(between).data(), w_of[2], b_of[2], a_of[2], false,
                              write(out).data(), stream);
    return error;
  });
  return out;
}

}  // namespace

SODFAST_CUDA_LIBRARY(m) { m.impl("ilblock", TORCH_BOX(&ilblock)); }

}  // namespace sodfast
