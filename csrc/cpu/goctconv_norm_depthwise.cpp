// BatchNorm + PReLU of every scale and the depthwise 3×3 behind them, as an ILBlock has them twice (CSNet,
// section 3.2).
//
//   y = prelu((x - mean) · γ/√(var + ε) + β, slope),   out[c] = w[c] * y[c]   (zeros outside),
//   channel_means[b][c] = mean_{h,w} y,   moments[c][b] = mean and Σ (· - mean)² of out's plane
//
// y is never in memory: a band of its rows is made in L1, convolved from there, and the band of results is measured
// while it is in L1. Per value the forward reads x once or, without its moments, twice (from L2, where a channel's
// planes fit) and writes out: 2 to 3 accesses where the two layers alone have 5. The backward makes y again:
//
//   gy = w turned around * g,   gw[k] = Σ g · y shifted by k,   then as goctconv_norm_act's
//
// reads g and x, writes gy where gx will be, reads that and x again and writes gx: 6 accesses for 9.
#include "cpu/depthwise_rows.h"
#include "cpu/norm_act.h"
#include "cpu/table.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// A band of a plane's rows with one more above and below, zeros around the map, and room for whole vectors.
template <class T>
class Band {
 public:
  static constexpr int64_t margin = Vec<T>::lanes;  // left of a row, so that rows begin at a cache line
  static int64_t pitch(int64_t cols) { return margin + (cols + margin) / margin * margin; }
  // Rows of a band: some 16 KiB, half of L1.
  static int64_t rows(int64_t height, int64_t cols) {
    constexpr int64_t bytes = 16 << 10;
    return least(height, most(8, bytes / (pitch(cols) * static_cast<int64_t>(sizeof(T)))));
  }
  static int64_t items(int64_t height, int64_t cols) { return (rows(height, cols) + 2) * pitch(cols) + margin; }

  Band(Scratch& scratch, int64_t height, int64_t cols)
      : height_(height),
        cols_(cols),
        pitch_(pitch(cols)),
        data_(scratch.take<T>(items(height, cols))) {
    for (int64_t i = 0; i < items(height, cols); ++i) data_[i] = T(0);
  }
  // Rows [first - 1, first + n + 1) of the plane: write(row, where).
  template <class F>
  void fill(int64_t first, int64_t n, const F& write) {
    for (int64_t y = first - 1; y <= first + n; ++y) {
      T* where = data_ + (y - first + 1) * pitch_ + margin;
      if (y >= 0 && y < height_)
        write(y, where);
      else
        for (int64_t x = 0; x < cols_; ++x) where[x] = T(0);
    }
  }
  const T* row_above() const { return data_ + margin; }
  int64_t pitch() const { return pitch_; }

 private:
  int64_t height_, cols_, pitch_;
  T* data_;
};

// total[ky][kx] += Σ g[y][x] · in[y + ky - 1][x + kx - 1] over n rows of two bands; rows are summed in float lanes of
// 64 values at most, these in double.
template <class T, int R>
void add_row_products(const T* g, const T* in, int64_t pitch, int64_t cols, Vec<T> (&sums)[9]) {
  for_each_vector<T>(cols, [&](int64_t x, int64_t n) {
    Vec<T> gradient[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) gradient[r] = load(g + r * pitch + x, n);
#pragma GCC unroll 4
    for (int i = 0; i < R + 2; ++i) {
      const T* p = in + (i - 1) * pitch + x;
      // The last vector's lanes past the row are left out: there zero meets what may be NaN.
      Vec<T> taps[3] = {load(p - 1, n), load(p, n), load(p + 1, n)};
      pin(taps[0]), pin(taps[1]), pin(taps[2]);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const int ky = i - r;
        if (ky < 0 || ky > 2) continue;
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) sums[3 * ky + kx] = fma(gradient[r], taps[kx], sums[3 * ky + kx]);
      }
    }
  });
}
template <class T>
void add_products(const Band<T>& gradients, const Band<T>& inputs, int64_t n, int64_t cols, double (&total)[9]) {
  const int64_t pitch = gradients.pitch(), vectors = (cols + Vec<T>::lanes - 1) / Vec<T>::lanes;
  const int64_t group = most(2, 64 / most(vectors, 1) / 2 * 2);
  const T *g = gradients.row_above() + pitch, *in = inputs.row_above() + pitch;
  for (int64_t first = 0; first < n; first += group) {
    Vec<T> sums[9];
    for (auto& v : sums) v = Vec<T>(T(0));
    int64_t y = first;
    const int64_t end = least(n, first + group);
    for (; y + 2 <= end; y += 2) add_row_products<T, 2>(g + y * pitch, in + y * pitch, pitch, cols, sums);
    if (y < end) add_row_products<T, 1>(g + y * pitch, in + y * pitch, pitch, cols, sums);
    for (int k = 0; k < 9; ++k) total[k] += static_cast<double>(sum(sums[k]));
  }
}

// f(first row, rows, values before them in the plane, values in them) for every band of a plane.
template <class T, class F>
void for_each_band(int64_t rows, int64_t cols, const F& f) {
  const int64_t band = Band<T>::rows(rows, cols);
  for (int64_t y = 0; y < rows; y += band) f(y, least(band, rows - y), y * cols, least(band, rows - y) * cols);
}

template <class T>
void norm_depthwise(const Pyramid& maps, const T* const* xs, const T* gamma, const T* beta, const T* slope,
                    const T* weight, const double* moments, T eps, bool training, T* mean, T* var, T* const* ys,
                    T* channel_means, double* out_moments, const Parallel& parallel) {
  const int64_t total = maps.total();
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t channels = maps.channels[s], area = maps.area(s), rows = maps.rows(s), cols = maps.cols(s);
    parallel(channels, grain_for(17 * maps.batch * area), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes<T>(Band<T>::items(rows, cols)));
      Band<T> band(scratch, rows, cols);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = maps.begin(s) + c;
        const double* given = moments == nullptr ? nullptr : moments + 2 * i * maps.batch;
        if (training) measure_channel(xs[s] + c * area, maps.batch, channels * area, area, given, mean[i], var[i]);
        const ChannelNorm<T> norm(mean[i], var[i], eps, gamma[i], beta[i], slope[i]);
        for (int64_t b = 0; b < maps.batch; ++b) {
          const T* x = xs[s] + (b * channels + c) * area;
          T* out = ys[s] + (b * channels + c) * area;
          double sum = 0;
          Moments of_out;
          for_each_band<T>(rows, cols, [&](int64_t first, int64_t n, int64_t before, int64_t values) {
            band.fill(first, n, [&](int64_t y, T* where) {
              const double of_row = normalise(norm, x + y * cols, cols, where);
              if (y >= first && y < first + n) sum += of_row;
            });
            depthwise_rows<T, Tail::exact>(
                {band.row_above(), band.pitch(), cols, weight + 9 * i, T(0), T(1), out + before, cols}, n);
            if (training) add_moments(out + before, values, of_out);
          });
          channel_means[b * total + i] = static_cast<T>(sum / static_cast<double>(area));
          if (training) {
            out_moments[2 * (i * maps.batch + b)] = of_out.mean;
            out_moments[2 * (i * maps.batch + b) + 1] = of_out.m2;
          }
        }
      }
    });
  }
}

template <class T>
void norm_depthwise_backward(const Pyramid& maps, const T* const* gys, const T* const* xs, const T* gamma,
                             const T* beta, const T* slope, const T* mean, const T* var, const T* weight, T eps,
                             bool training, T* const* gxs, T* ggamma, T* gbeta, T* gslope, T* gweight,
                             const Parallel& parallel) {
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t channels = maps.channels[s], area = maps.area(s), rows = maps.rows(s), cols = maps.cols(s);
    parallel(channels, grain_for(40 * maps.batch * area), [&](int64_t begin, int64_t end) {
      Scratch scratch(2 * Scratch::bytes<T>(Band<T>::items(rows, cols)));
      Band<T> gradients(scratch, rows, cols), inputs(scratch, rows, cols);
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = maps.begin(s) + c;
        const ChannelNorm<T> norm(mean[i], var[i], eps, gamma[i], beta[i], slope[i]);
        T turned[9];
        for (int k = 0; k < 9; ++k) turned[k] = weight[9 * i + 8 - k];
        NormSums sums;
        double products[9] = {};
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          const T *g = gys[s] + plane, *x = xs[s] + plane;
          T* gy = gxs[s] + plane;
          for_each_band<T>(rows, cols, [&](int64_t first, int64_t n, int64_t before, int64_t values) {
            gradients.fill(first, n, [&](int64_t y, T* where) {
              for_each_vector<T>(cols, [&](int64_t j, int64_t k) { store(load(g + y * cols + j, k), where + j, k); });
            });
            inputs.fill(first, n, [&](int64_t y, T* where) { normalise(norm, x + y * cols, cols, where); });
            depthwise_rows<T, Tail::exact>(
                {gradients.row_above(), gradients.pitch(), cols, turned, T(0), T(1), gy + before, cols}, n);
            add_products(gradients, inputs, n, cols, products);
            add_sums(norm, gy + before, x + before, values, sums);
          });
        }
        for (int k = 0; k < 9; ++k) gweight[9 * i + k] = static_cast<T>(products[k]);
        ggamma[i] = static_cast<T>(sums.gz_xhat);
        gbeta[i] = static_cast<T>(sums.gz);
        gslope[i] = static_cast<T>(sums.gslope);
        for (int64_t b = 0; b < maps.batch; ++b) {
          const int64_t plane = (b * channels + c) * area;
          write_gradient(norm, sums, maps.batch * area, training, gxs[s] + plane, xs[s] + plane, area, gxs[s] + plane);
        }
      }
    });
  }
}

}  // namespace

template <class T>
void add_goctconv_norm_depthwise(Kernels<T>& table) {
  table.norm_depthwise = norm_depthwise<T>;
  table.norm_depthwise_backward = norm_depthwise_backward<T>;
}
SODFAST_INSTANTIATE(add_goctconv_norm_depthwise)

}  // namespace SODFAST_ISA
}  // namespace sodfast
