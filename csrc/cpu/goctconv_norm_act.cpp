// BatchNorm + PReLU of every scale (CSNet Eq. 5), with the spatial means that dynamic weight decay needs (Eq. 4).
//
//   z = (x - mean) · γ/√(var + ε) + β,   y = prelu(z, slope),   channel_means[b][c] = mean_{h,w} y
//
// Training reads x twice (statistics; result) and writes y; the mean of y is summed on the way. Statistics: blocks of
// a few KiB are summed and then measured about their own mean while in L1, and combined in double (Chan's formula),
// so that a large mean costs no digits. The backward reads x and the gradient twice and recomputes z.
#include <cmath>

#include "cpu/table.h"
#include "cpu/taps.h"

namespace sodfast {
namespace SODFAST_ISA {
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

// y = prelu((x - mean) · scale + beta, slope) over one plane; returns Σ y.
template <class T>
double apply(const T* x, int64_t n, T mean, T scale, T beta, T slope, T* y) {
  const Vec<T> m(mean), a(scale), b(beta), s(slope);
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
    total += static_cast<double>(sum(block));
    for (; i < end; ++i) {
      const T z = (x[i] - mean) * scale + beta;
      y[i] = z > 0 ? z : slope * z;
      total += static_cast<double>(y[i]);
    }
  });
  return total;
}

template <class T>
void norm_act(const Pyramid& maps, const T* const* xs, const T* gamma, const T* beta, const T* slope, T eps,
              bool training, T* mean, T* var, T* const* ys, T* channel_means, const Parallel& parallel) {
  const int64_t total = maps.total();
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t channels = maps.channels[s], area = maps.area(s);
    parallel(channels, grain_for(8 * maps.batch * area), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = maps.begin(s) + c;
        if (training) {
          Moments moments;
          for (int64_t b = 0; b < maps.batch; ++b) add_moments(xs[s] + (b * channels + c) * area, area, moments);
          // Nothing to average (an empty batch) has no mean, as 0/0.
          mean[i] = static_cast<T>(moments.count > 0 ? moments.mean : std::nan(""));
          var[i] = static_cast<T>(moments.count > 0 ? moments.m2 / moments.count : std::nan(""));
        }
        const T scale = static_cast<T>(static_cast<double>(gamma[i]) /
                                       std::sqrt(static_cast<double>(var[i]) + static_cast<double>(eps)));
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          const double sum = apply(xs[s] + plane, area, mean[i], scale, beta[i], slope[i], ys[s] + plane);
          channel_means[b * total + i] = static_cast<T>(sum / static_cast<double>(area));
        }
      }
    });
  }
}

struct Sums {
  double gz = 0, gz_xhat = 0, gslope = 0;
};

template <class T>
void add_sums(const T* gy, const T* x, int64_t n, T mean, T inverse, T gamma, T beta, T slope, Sums& sums) {
  const Vec<T> m(mean), r(inverse), a(gamma), b(beta), s(slope), zero(T(0));
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

// gx = γ/√(var + ε) · (gz - mean(gz) - x̂ · mean(gz·x̂)); with fixed statistics the means do not enter.
template <class T>
void norm_act_backward(const Pyramid& maps, const T* const* gys, const T* const* xs, const T* gamma, const T* beta,
                       const T* slope, const T* mean, const T* var, T eps, bool training, T* const* gxs, T* ggamma,
                       T* gbeta, T* gslope, const Parallel& parallel) {
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t channels = maps.channels[s], area = maps.area(s);
    parallel(channels, grain_for(16 * maps.batch * area), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = maps.begin(s) + c;
        const double inverse = 1 / std::sqrt(static_cast<double>(var[i]) + static_cast<double>(eps));
        const T inv = static_cast<T>(inverse);
        Sums sums;
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          add_sums(gys[s] + plane, xs[s] + plane, area, mean[i], inv, gamma[i], beta[i], slope[i], sums);
        }
        ggamma[i] = static_cast<T>(sums.gz_xhat);
        gbeta[i] = static_cast<T>(sums.gz);
        gslope[i] = static_cast<T>(sums.gslope);
        const double n = static_cast<double>(maps.batch * area);
        const Vec<T> m(mean[i]), r(inv), a(gamma[i]), bb(beta[i]), sl(slope[i]), zero(T(0));
        const Vec<T> k(static_cast<T>(static_cast<double>(gamma[i]) * inverse));
        const Vec<T> mean_gz(static_cast<T>(training ? sums.gz / n : 0)),
            mean_gzx(static_cast<T>(training ? sums.gz_xhat / n : 0));
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          const T *g = gys[s] + plane, *x = xs[s] + plane;
          T* out = gxs[s] + plane;
          for_each_vector<T>(area, [&](int64_t p, int64_t count) {
            const Vec<T> gy = load(g + p, count), xhat = (load(x + p, count) - m) * r, z = fma(xhat, a, bb);
            const Vec<T> gz = where_greater(z, zero, gy, gy * sl);
            store(k * (gz - mean_gz - xhat * mean_gzx), out + p, count);
          });
        }
      }
    });
  }
}

}  // namespace

template <class T>
void add_goctconv_norm_act(Kernels<T>& table) {
  table.norm_act = norm_act<T>;
  table.norm_act_backward = norm_act_backward<T>;
}
SODFAST_INSTANTIATE(add_goctconv_norm_act)

}  // namespace SODFAST_ISA
}  // namespace sodfast
