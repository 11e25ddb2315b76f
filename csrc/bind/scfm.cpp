// torch.ops.sodfast.scfm and its gradients on the CPU.
#include <tuple>

#include "bind/cpu.h"

namespace sodfast {
namespace {

ScfmShape shape_for(const char* op, const Tensor& x, const Tensor& y, bool multiply) {
  check(x.is_cpu(), op, "x must be on the CPU");
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op,
        "x must be float32 or float64");
  check_like(op, "y", y, x);
  check(x.dim() == 4, op, "x must have 4 dimensions (B, C, H, W), got ", shape_of(x));
  check(y.dim() == 4 && y.size(0) == x.size(0) && y.size(1) == x.size(1), op, "y must have shape (", x.size(0), ", ",
        x.size(1), ", h, w) as x has, got ", shape_of(y));
  for (const Tensor* t : {&x, &y})
    for (int64_t d = 2; d < 4; ++d)
      check(t->size(d) > 0 && t->size(d) < int64_t(1) << 31, op, "an empty or too large size: ", shape_of(*t));
  return {x.size(0) * x.size(1), x.size(2), x.size(3), y.size(2), y.size(3), multiply};
}

Tensor empty_maps(const Tensor& like) {
  return empty_for(like, {like.size(0), like.size(1), like.size(2), like.size(3)});
}

Tensor scfm(const Tensor& x, const Tensor& y, bool multiply) {
  const ScfmShape shape = shape_for("scfm", x, y, multiply);
  const Tensor in = torch::stable::contiguous(x), small = torch::stable::contiguous(y), out = empty_maps(x);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().scfm(shape, read<T>(in), read<T>(small), write<T>(out), torch_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> scfm_backward(const Tensor& grad, const Tensor& x, const Tensor& y, bool multiply) {
  const char* op = "scfm_backward";
  const ScfmShape shape = shape_for(op, x, y, multiply);
  check_like(op, "grad", grad, x);
  check(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) && grad.size(2) == x.size(2) &&
            grad.size(3) == x.size(3),
        op, "grad must have shape ", shape_of(x), ", got ", shape_of(grad));
  const Tensor g = torch::stable::contiguous(grad), in = torch::stable::contiguous(x),
               small = torch::stable::contiguous(y);
  const Tensor gx = multiply ? empty_maps(x) : empty_for(x, {0}), gy = empty_maps(y);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().scfm_backward(shape, read<T>(g), read<T>(in), read<T>(small), write<T>(gx), write<T>(gy),
                               torch_threads());
  });
  return {gx, gy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("scfm", TORCH_BOX(&scfm));
  m.impl("scfm_backward", TORCH_BOX(&scfm_backward));
}

}  // namespace sodfast
