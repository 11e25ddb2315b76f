// What every binding needs: checks that name the argument, contiguous inputs, outputs, and torch's threads for the
// kernels. The only folder that includes torch; everything goes through its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/shapes.h"
#include "cpu/kernels.h"

namespace sodfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Throws "sodfast::op: message" unless the condition holds.
template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "sodfast::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '(';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ')';
  return s.str();
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check(t.is_cpu(), op, name, " must be on the CPU");
  check(t.scalar_type() == like.scalar_type(), op, name, " has another dtype than the first tensor");
}

// A vector with one value per channel, or nothing.
inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& like) {
  check_like(op, name, t, like);
  check(t.dim() == 1 && t.size(0) == n, op, name, " must have shape (", n, "), got ", shape_of(t));
}

// The geometry of a list of scales; every scale's size is scale 0's divided by 2^i.
inline Pyramid pyramid_of(const char* op, const char* name, const Tensors& xs) {
  check(!xs.empty() && xs.size() <= max_scales, op, name, " must hold 1 to ", max_scales, " scales, got ", xs.size());
  Pyramid p;
  p.scales = static_cast<int>(xs.size());
  for (int s = 0; s < p.scales; ++s) {
    const Tensor& x = xs[s];
    check(x.dim() == 4, op, name, "[", s, "] must have 4 dimensions (B, C, H, W), got ", shape_of(x));
    check_like(op, name, x, xs[0]);
    check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op, name,
          " must be float32 or float64");
    if (s == 0) p.batch = x.size(0), p.height = x.size(2), p.width = x.size(3);
    check(x.size(0) == p.batch, op, name, "[", s, "] has batch ", x.size(0), ", scale 0 has ", p.batch);
    check(x.size(2) << s == p.height && x.size(3) << s == p.width && x.size(2) > 0 && x.size(3) > 0, op, name, "[", s,
          "] is ", x.size(2), "x", x.size(3), ", which is not scale 0's ", p.height, "x", p.width, " divided by ",
          1 << s);
    p.channels[s] = x.size(1);
  }
  return p;
}

inline void check_pyramid(const char* op, const char* name, const Tensors& xs, const Pyramid& p) {
  check(static_cast<int>(xs.size()) == p.scales, op, name, " must hold ", p.scales, " scales, got ", xs.size());
  for (int s = 0; s < p.scales; ++s)
    check(xs[s].dim() == 4 && xs[s].size(0) == p.batch && xs[s].size(1) == p.channels[s] &&
              xs[s].size(2) == p.rows(s) && xs[s].size(3) == p.cols(s),
          op, name, "[", s, "] must have shape (", p.batch, ", ", p.channels[s], ", ", p.rows(s), ", ", p.cols(s),
          "), got ", shape_of(xs[s]));
}

inline Tensors contiguous_all(const Tensors& xs) {
  Tensors out;
  for (const Tensor& x : xs) out.push_back(torch::stable::contiguous(x));
  return out;
}

inline Tensor empty_for(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::new_empty(like, size);
}

inline Tensors empty_pyramid(const Tensor& like, const Pyramid& p) {
  Tensors out;
  for (int s = 0; s < p.scales; ++s) out.push_back(empty_for(like, {p.batch, p.channels[s], p.rows(s), p.cols(s)}));
  return out;
}

// Data pointers of a list; T is float or double, already checked.
template <class T>
std::vector<const T*> read(const Tensors& xs) {
  std::vector<const T*> p;
  for (const Tensor& x : xs) p.push_back(static_cast<const T*>(x.const_data_ptr()));
  return p;
}
template <class T>
std::vector<T*> write(const Tensors& xs) {
  std::vector<T*> p;
  for (const Tensor& x : xs) p.push_back(static_cast<T*>(x.mutable_data_ptr()));
  return p;
}
template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// An optional per-channel vector, checked and contiguous; keeps it alive while the kernel reads it.
struct Optional {
  std::optional<Tensor> tensor;
  Optional(const char* op, const char* name, const std::optional<Tensor>& t, int64_t n, const Tensor& like) {
    if (!t.has_value()) return;
    check_vector(op, name, *t, n, like);
    tensor = torch::stable::contiguous(*t);
  }
  template <class T>
  const T* get() const {
    return tensor.has_value() ? read<T>(*tensor) : nullptr;
  }
};

// Calls f(float()) or f(double()).
template <class F>
void for_dtype(const Tensor& like, const F& f) {
  like.scalar_type() == ScalarType::Float ? f(float()) : f(double());
}

inline Parallel torch_threads() {
  return {[](int64_t n, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  }};
}

}  // namespace sodfast
