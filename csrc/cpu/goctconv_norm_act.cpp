// BatchNorm + PReLU of every scale (CSNet Eq. 5), with the spatial means that dynamic weight decay needs (Eq. 4).
//
//   z = (x - mean) · γ/√(var + ε) + β,   y = prelu(z, slope),   channel_means[b][c] = mean_{h,w} y
//
// Training reads x twice (statistics; result), or once where x came with its moments, and writes y; the mean of y is
// summed on the way. The backward reads x and the gradient twice. A channel's planes stay in L2 in between, if they
// fit.
#include "cpu/norm_act.h"

#include "cpu/table.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

template <class T>
void norm_act(const Pyramid& maps, const T* const* xs, const T* gamma, const T* beta, const T* slope,
              const double* moments, T eps, bool training, T* mean, T* var, T* const* ys, T* channel_means,
              const Parallel& parallel) {
  const int64_t total = maps.total();
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t channels = maps.channels[s], area = maps.area(s);
    parallel(channels, grain_for(8 * maps.batch * area), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = maps.begin(s) + c;
        const double* given = moments == nullptr ? nullptr : moments + 2 * i * maps.batch;
        if (training) measure_channel(xs[s] + c * area, maps.batch, channels * area, area, given, mean[i], var[i]);
        const ChannelNorm<T> norm(mean[i], var[i], eps, gamma[i], beta[i], slope[i]);
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          const double sum = normalise(norm, xs[s] + plane, area, ys[s] + plane);
          channel_means[b * total + i] = static_cast<T>(sum / static_cast<double>(area));
        }
      }
    });
  }
}

template <class T>
void norm_act_backward(const Pyramid& maps, const T* const* gys, const T* const* xs, const T* gamma, const T* beta,
                       const T* slope, const T* mean, const T* var, T eps, bool training, T* const* gxs, T* ggamma,
                       T* gbeta, T* gslope, const Parallel& parallel) {
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t channels = maps.channels[s], area = maps.area(s);
    parallel(channels, grain_for(16 * maps.batch * area), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = maps.begin(s) + c;
        const ChannelNorm<T> norm(mean[i], var[i], eps, gamma[i], beta[i], slope[i]);
        NormSums sums;
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          add_sums(norm, gys[s] + plane, xs[s] + plane, area, sums);
        }
        ggamma[i] = static_cast<T>(sums.gz_xhat);
        gbeta[i] = static_cast<T>(sums.gz);
        gslope[i] = static_cast<T>(sums.gslope);
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          write_gradient(norm, sums, maps.batch * area, training, gys[s] + plane, xs[s] + plane, area, gxs[s] + plane);
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
