// Batch normalisation with PReLU on runs of one channel's values, for the kernels that do it alone (goctconv_norm_act)
// and before a convolution (goctconv_norm_depthwise).
//
//   x̂ = (x - mean) / √(var + ε),   z = γ x̂ + β,   y = prelu(z, slope)
//
// Statistics: blocks of a few KiB are summed and then measured about their own mean while in L1, and combined in double
// (Chan's formula), so that a large mean costs no digits. The backward makes x̂ and z again.
#pragma once

#include <cmath>

#include "common/scratch.h"
#include "common/simd.h"

namespace sodfast {
namespace {

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: Σ (x - mean)²
  void add(double n, double other_mean, double other_m2) {
    const double delta = other_mean - mean, all = count + n;
    mean += delta * n / all;
    m2 += other_m2 + delta * delta * count * n / all;
    count = all;
  }
};

template <class T, class F>
void for_each_block(int64_t n, const F& f) {  // blocks that stay in L1; a lane adds up 64 floats at most
  constexpr int64_t block = 64 * Vec<T>::lanes;
  for (int64_t i = 0; i < n; i += block) f(i, least(block, n - i));
}

template <class T>
void add_moments(const T* x, int64_t n, Moments& moments) {
  for_each_block<T>(n, [&](int64_t first, int64_t count) {
    const T* p = x + first;
    Vec<T> total(T(0)), total2(T(0));
    for_each_vector<T>(count, [&](int64_t i, int64_t k) { total = total + load(p + i, k); });
    const T mean = static_cast<T>(static_cast<double>(sum(total)) / static_cast<double>(count));
    const Vec<T> m(mean);
    Vec<T> rest(T(0));  // Σ (x - mean) is not exactly zero, since mean is rounded
    constexpr int64_t L = Vec<T>::lanes;
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      const Vec<T> d = Vec<T>::load(p + i) - m;
      rest = rest + d;
      total2 = fma(d, d, total2);
    }
    double r = static_cast<double>(sum(rest)), m2 = static_cast<double>(sum(total2));
    for (; i < count; ++i) {
      const double d = static_cast<double>(p[i]) - static_cast<double>(mean);
      r += d;
      m2 += d * d;
    }
    const double n_block = static_cast<double>(count);
    moments.add(n_block, static_cast<double>(mean) + r / n_block, m2 - r * r / n_block);
  });
}

// Mean and variance of a channel whose planes of `area` values are `stride` apart: of its moments, [batch][2], where
// they are given. Nothing to average (an empty batch) has neither, as 0/0.
template <class T>
void measure_channel(const T* x, int64_t batch, int64_t stride, int64_t area, const double* given, T& mean, T& var) {
  Moments moments;
  for (int64_t b = 0; b < batch; ++b) {
    if (given == nullptr)
      add_moments(x + b * stride, area, moments);
    else if (area > 0)
      moments.add(static_cast<double>(area), given[2 * b], given[2 * b + 1]);
  }
  mean = static_cast<T>(moments.count > 0 ? moments.mean : std::nan(""));
  var = static_cast<T>(moments.count > 0 ? moments.m2 / moments.count : std::nan(""));
}

// One channel's norm.
template <class T>
struct ChannelNorm {
  T mean, gamma, beta, slope;
  double inverse;  // 1 / √(var + ε)
  ChannelNorm(T mean_, T var, T eps, T gamma_, T beta_, T slope_)
      : mean(mean_),
        gamma(gamma_),
        beta(beta_),
        slope(slope_),
        inverse(1 / std::sqrt(static_cast<double>(var) + static_cast<double>(eps))) {}
  T scale() const { return static_cast<T>(static_cast<double>(gamma) * inverse); }
};

// Writes y for n values; returns Σ y.
template <class T>
double normalise(const ChannelNorm<T>& norm, const T* x, int64_t n, T* y) {
  const Vec<T> m(norm.mean), a(norm.scale()), b(norm.beta), s(norm.slope);
  double total = 0;
  for_each_block<T>(n, [&](int64_t first, int64_t count) {
    Vec<T> block(T(0));
    constexpr int64_t L = Vec<T>::lanes;
    int64_t i = first;
    const int64_t end = first + count;
    for (; i + L <= end; i += L) {
      const Vec<T> v = prelu(fma(Vec<T>::load(x + i) - m, a, b), s);
      v.store(y + i);
      block = block + v;
    }
    if (i < end) {
      const Vec<T> v = keep(prelu(fma(Vec<T>::load(x + i, end - i) - m, a, b), s), end - i);
      v.store(y + i, end - i);
      block = block + v;
    }
    total += static_cast<double>(sum(block));
  });
  return total;
}

// What a channel's backward adds up before it can write any gradient to x.
struct NormSums {
  double gz = 0, gz_xhat = 0, gslope = 0;  // the gradients to β, γ and the slope
};

template <class T>
void add_sums(const ChannelNorm<T>& norm, const T* gy, const T* x, int64_t n, NormSums& sums) {
  const Vec<T> m(norm.mean), r(static_cast<T>(norm.inverse)), a(norm.gamma), b(norm.beta), s(norm.slope), zero(T(0));
  for_each_block<T>(n, [&](int64_t first, int64_t count) {
    Vec<T> gz(zero), gzx(zero), gs(zero);
    constexpr int64_t L = Vec<T>::lanes;
    int64_t i = first;
    const int64_t end = first + count;
    const auto step = [&](Vec<T> g, Vec<T> in) {
      const Vec<T> xhat = (in - m) * r, z = fma(xhat, a, b), d = where_greater(z, zero, g, g * s);
      gz = gz + d;
      gzx = fma(d, xhat, gzx);
      gs = gs + where_greater(z, zero, zero, g * z);
    };
    for (; i + L <= end; i += L) step(Vec<T>::load(gy + i), Vec<T>::load(x + i));
    // Lanes past the end: a zero gradient adds zero, whatever x is there.
    if (i < end) step(Vec<T>::load(gy + i, end - i), Vec<T>::load(x + i, end - i));
    sums.gz += static_cast<double>(sum(gz));
    sums.gz_xhat += static_cast<double>(sum(gzx));
    sums.gslope += static_cast<double>(sum(gs));
  });
}

// gx = γ/√(var + ε) · (gz - mean(gz) - x̂ · mean(gz·x̂)) over `count` values of the channel in all; with fixed statistics
// the means do not enter. gx may be gy.
template <class T>
void write_gradient(const ChannelNorm<T>& norm, const NormSums& sums, int64_t count, bool training, const T* gy,
                    const T* x, int64_t n, T* gx) {
  const double all = static_cast<double>(count);
  const Vec<T> m(norm.mean), r(static_cast<T>(norm.inverse)), a(norm.gamma), b(norm.beta), s(norm.slope), zero(T(0));
  const Vec<T> k(norm.scale());
  const Vec<T> mean_gz(static_cast<T>(training ? sums.gz / all : 0)),
      mean_gzx(static_cast<T>(training ? sums.gz_xhat / all : 0));
  for_each_vector<T>(n, [&](int64_t i, int64_t lanes) {
    const Vec<T> g = load(gy + i, lanes), xhat = (load(x + i, lanes) - m) * r, z = fma(xhat, a, b);
    const Vec<T> gz = where_greater(z, zero, g, g * s);
    store(k * (gz - mean_gz - xhat * mean_gzx), gx + i, lanes);
  });
}

}  // namespace
}  // namespace sodfast
