// What every binding needs: checks that name the argument, contiguous inputs, outputs. The only folder that includes
// torch; everything goes through its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/shapes.h"

namespace sodfast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// No iostream: a toolchain that links the C++ library into this module has a second set of locales beside torch's, and
// writing a number to a stream then crashes.
inline std::string text(const char* part) { return part; }
inline std::string text(const std::string& part) { return part; }
template <class Integer>
std::string text(Integer part) {
  return std::to_string(part);
}

// Throws "sodfast::op: message" unless the condition holds.
template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  throw std::runtime_error((std::string("sodfast::") + op + ": " + ... + text(parts)));
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

// What the library that is being compiled serves: the CPU's kernels, CUDA's, or CUDA's run on the host in tests.
#ifdef SODFAST_BIND_CUDA
constexpr const char* known_dtypes = "float32, float16 or bfloat16";
#else
constexpr const char* known_dtypes = "float32 or float64";
#endif
#if defined(SODFAST_BIND_CUDA) && !defined(SODFAST_CUDA_ON_HOST)
constexpr const char* known_device = "a CUDA device";
inline bool on_known_device(const Tensor& t) { return t.is_cuda(); }
#else
constexpr const char* known_device = "the CPU";
inline bool on_known_device(const Tensor& t) { return t.is_cpu(); }
#endif
inline bool is_known(ScalarType type) {
#ifdef SODFAST_BIND_CUDA
  if (type == ScalarType::Half || type == ScalarType::BFloat16) return true;
#endif
#if !defined(SODFAST_BIND_CUDA) || defined(SODFAST_CUDA_ON_HOST)
  if (type == ScalarType::Double) return true;
#endif
  return type == ScalarType::Float;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check(on_known_device(t), op, name, " must be on ", known_device);
  check(t.get_device_index() == like.get_device_index(), op, name, " is on another device than the first tensor");
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_device(op, name, t, like);
  check(t.scalar_type() == like.scalar_type(), op, name, " has another dtype than the first tensor");
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_like(op, name, t, like);
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  check(same, op, name, " must have shape ", shape_of(like), ", got ", shape_of(t));
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
    check(is_known(x.scalar_type()), op, name, " must be ", known_dtypes);
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

// The moments of every plane of xs, where they are given: mean and Σ (x - mean)², contiguous.
inline std::optional<Tensor> checked_moments(const char* op, const std::optional<Tensor>& moments, const Pyramid& p,
                                             const Tensor& like, bool training) {
  if (!moments.has_value()) return std::nullopt;
  const Tensor& m = *moments;
  check_device(op, "moments", m, like);
  check(training, op, "moments have no use without training");
  check(m.scalar_type() == ScalarType::Double && m.dim() == 3 && m.size(0) == p.total() && m.size(1) == p.batch &&
            m.size(2) == 2,
        op, "moments must be float64 of shape (", p.total(), ", ", p.batch, ", 2), got ", shape_of(m));
  return torch::stable::contiguous(m);
}

inline Tensors contiguous_all(const Tensors& xs) {
  Tensors out;
  for (const Tensor& x : xs) out.push_back(torch::stable::contiguous(x));
  return out;
}

// Whether a tensor lies in memory as (B, H, W, C); false for one that also lies as (B, C, H, W).
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.numel() == 0 || t.is_contiguous()) return false;
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}
inline MemoryFormat format_of(const Tensor& t) {
  return is_channels_last(t) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The tensor itself where it lies in memory that way. Asking torch costs a microsecond, so it is asked for copies only.
inline Tensor contiguous_in(MemoryFormat format, const Tensor& t) {
  const bool is = format == MemoryFormat::ChannelsLast ? is_channels_last(t) : t.is_contiguous();
  return is ? t : torch::stable::contiguous(t, format);
}

inline Tensor empty_for(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::new_empty(like, size);
}

// Of the shape of a (B, C, H, W) tensor.
inline Tensor empty_maps(const Tensor& like, MemoryFormat format = MemoryFormat::Contiguous) {
  const std::vector<int64_t> size = {like.size(0), like.size(1), like.size(2), like.size(3)};
  if (format == MemoryFormat::Contiguous) return empty_for(like, size);
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

inline Tensors empty_pyramid(const Tensor& like, const Pyramid& p) {
  Tensors out;
  for (int s = 0; s < p.scales; ++s) out.push_back(empty_for(like, {p.batch, p.channels[s], p.rows(s), p.cols(s)}));
  return out;
}

// An optional per-channel vector, checked and contiguous; keeps it alive while the kernel reads it.
struct Optional {
  std::optional<Tensor> tensor;
  Optional(const char* op, const char* name, const std::optional<Tensor>& t, int64_t n, const Tensor& like) {
    if (!t.has_value()) return;
    check_vector(op, name, *t, n, like);
    tensor = torch::stable::contiguous(*t);
  }
  const void* get() const { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }
  template <class T>
  const T* get() const {
    return static_cast<const T*>(get());
  }
};

}  // namespace sodfast
