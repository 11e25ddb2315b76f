// One row of a feature map as another scale sees it. All factors are powers of two up to 2^(max_scales - 1) = 8.
//
//   forward    finer -> coarser   max-pool f×f (after a 2×2 average pool where the stride is 2)
//              coarser -> finer   bilinear ×f, align_corners=False: source of x is (x + ½)/f − ½, clamped
//   backward   finer -> coarser   the transpose of bilinear ×f
//              coarser -> finer   max-pool's gradient, to the first maximum of each window
#pragma once

#include <cstring>

#include "common/simd.h"

namespace sodfast {
namespace {

// ------------------------------------------------------------------------------------------------- pooling
// f(x, even, odd, count): `count` pairs of row from pair x on, taken apart.
template <class T, class F>
inline void for_each_pair(const T* a, const T* b, int64_t n, const F& f) {
  constexpr int64_t L = Vec<T>::lanes;
  for_each_vector<T>(n, [&](int64_t x, int64_t k) {
    const int64_t low = 2 * k < L ? 2 * k : L, high = 2 * k - low;
    const T *pa = a + 2 * x, *pb = b + 2 * x;
    const auto upper = [&](const T* p) { return high == 0 ? Vec<T>(T(0)) : load(p + L, high); };
    f(x, load(pa, low), upper(pa), load(pb, low), upper(pb), k);
  });
}

// dst[x] = mean of the 2×2 window at 2x of rows a and b.
template <class T>
void average_rows(const T* a, const T* b, T* __restrict dst, int64_t n) {
  for_each_pair(a, b, n, [&](int64_t x, Vec<T> a0, Vec<T> a1, Vec<T> b0, Vec<T> b1, int64_t k) {
    Vec<T> even, odd;
    deinterleave(a0 + b0, a1 + b1, even, odd);
    store((even + odd) * Vec<T>(T(0.25)), dst + x, k);
  });
}

// dst[x] = maximum of the 2×2 window at 2x of rows a and b.
template <class T>
void max_rows(const T* a, const T* b, T* __restrict dst, int64_t n) {
  for_each_pair(a, b, n, [&](int64_t x, Vec<T> a0, Vec<T> a1, Vec<T> b0, Vec<T> b1, int64_t k) {
    Vec<T> even, odd;
    deinterleave(max(a0, b0), max(a1, b1), even, odd);
    store(max(even, odd), dst + x, k);
  });
}

template <class T>
void split_pairs(const T* row, T* __restrict even, T* __restrict odd, int64_t n) {
  for (int64_t x = 0; x < n; ++x) even[x] = row[2 * x], odd[x] = row[2 * x + 1];
}
template <class T>
void add_pairs(const T* even, const T* odd, T* __restrict row, int64_t n) {
  for (int64_t x = 0; x < n; ++x) row[2 * x] += even[x], row[2 * x + 1] += odd[x];
}

// A feature map of one sample as stored, read at the resolution of the convolution.
template <class T>
struct PooledMap {
  const T* data;
  int64_t channels, rows, cols;  // as stored
  int64_t factor;                // max-pool window
  bool average;                  // 2×2 average pool first
  int64_t pitch, plane;          // from one row, one channel to the next

  PooledMap() = default;
  PooledMap(const T* p, int64_t c, int64_t h, int64_t w, int64_t f, bool mean)
      : PooledMap(p, c, h, w, f, mean, w, h * w) {}
  PooledMap(const T* p, int64_t c, int64_t h, int64_t w, int64_t f, bool mean, int64_t row, int64_t channel)
      : data(p),
        channels(c),
        rows(h),
        cols(w),
        factor(f),
        average(mean),
        pitch(row),
        plane(channel) {}

  bool direct() const { return factor == 1 && !average; }
  int64_t out_rows() const { return rows / (average ? 2 : 1) / factor; }
  int64_t out_cols() const { return cols / (average ? 2 : 1) / factor; }
  static int64_t line(int64_t cols) { return 3 * cols; }  // scratch items that the functions below need

  // Row y before the maximum (after the average).
  const T* fine_row(int64_t c, int64_t y, T* line) const {
    const T* p = data + c * plane;
    if (!average) return p + y * pitch;
    average_rows(p + 2 * y * pitch, p + (2 * y + 1) * pitch, line, cols / 2);
    return line;
  }

  void row(int64_t c, int64_t y, T* __restrict dst, T* line) const {
    if (factor == 1) {
      average ? (void)fine_row(c, y, dst) : (void)std::memcpy(dst, fine_row(c, y, line), cols * sizeof(T));
      return;
    }
    pooled(c, y, factor, dst, line);
  }

  // The way back through the maximum: dst rows (from the first of pooled row y's window on, `stride` apart) get
  // `gradient` at the first maximum of each window, in reading order (anywhere in it where it holds a NaN).
  void unpool_add(int64_t c, int64_t y, const T* gradient, T* dst, int64_t stride, T* line) const {
    if (factor == 2) return unpool_pairs(c, y, gradient, dst, dst + stride, line);
    const int64_t n = out_cols();
    T *best = line + cols, *where = best + n;  // row · factor + column, a small integer
    for (int64_t r = 0; r < factor; ++r) {
      const T* fine = fine_row(c, y * factor + r, line);
      for (int64_t x = 0; x < n; ++x)
        for (int64_t i = 0; i < factor; ++i) {
          const T value = fine[x * factor + i];
          if ((r == 0 && i == 0) || value > best[x]) best[x] = value, where[x] = static_cast<T>(r * factor + i);
        }
    }
    for (int64_t x = 0; x < n; ++x) {
      const int64_t at = static_cast<int64_t>(where[x]);
      dst[at / factor * stride + x * factor + at % factor] += gradient[x];
    }
  }

 private:
  // A maximum over f×f is a maximum over 2×2 of maxima over f/2 × f/2: a row of these, and lines for the next two.
  void pooled(int64_t c, int64_t y, int64_t f, T* dst, T* line) const {
    const int64_t n = cols / (average ? 2 : 1) / f;
    if (f == 2) {
      const T *a = fine_row(c, 2 * y, line), *b = fine_row(c, 2 * y + 1, line + 2 * n);
      return max_rows(a, b, dst, n);
    }
    pooled(c, 2 * y, f / 2, line, line + 4 * n);
    pooled(c, 2 * y + 1, f / 2, line + 2 * n, line + 4 * n);
    max_rows(line, line + 2 * n, dst, n);
  }

  // factor 2 without branches: the window's four values side by side, and the gradient to one of the four.
  void unpool_pairs(int64_t c, int64_t y, const T* gradient, T* d0, T* d1, T* line) const {
    const int64_t n = out_cols();
    T *a0 = line + cols, *a1 = a0 + n, *b0 = a1 + n, *b1 = b0 + n;
    split_pairs(fine_row(c, 2 * y, line), a0, a1, n);
    split_pairs(fine_row(c, 2 * y + 1, line), b0, b1, n);
    for_each_vector<T>(n, [&](int64_t x, int64_t k) {
      const Vec<T> va0 = load(a0 + x, k), va1 = load(a1 + x, k), vb0 = load(b0 + x, k), vb1 = load(b1 + x, k);
      const Vec<T> g = load(gradient + x, k), zero(T(0));
      const Vec<T> above = where_greater(va1, va0, va1, va0), below = where_greater(vb1, vb0, vb1, vb0);
      const Vec<T> down = where_greater(below, above, g, zero), up = g - down;
      store(where_greater(va1, va0, zero, up), a0 + x, k);
      store(where_greater(va1, va0, up, zero), a1 + x, k);
      store(where_greater(vb1, vb0, zero, down), b0 + x, k);
      store(where_greater(vb1, vb0, down, zero), b1 + x, k);
    });
    add_pairs(a0, a1, d0, n);
    add_pairs(b0, b1, d1, n);
  }
};

// ------------------------------------------------------------------------------------------------ bilinear
// Fine position y lies between coarse rows lower and lower + 1 with weight `upper` on the second. The weights are
// exact binary fractions. lower may be -1 and lower + 1 may be n: clamp both.
struct Between {
  int64_t lower;
  double upper;
};
inline Between between(int64_t y, int64_t factor) {
  const int64_t half = 2 * y + 1 - factor;  // 2·factor·(source position)
  const int64_t lower = half >= 0 ? half / (2 * factor) : -1;
  return {lower, static_cast<double>(half - lower * 2 * factor) / static_cast<double>(2 * factor)};
}
inline int64_t clamp_to(int64_t y, int64_t n) { return y < 0 ? 0 : (y >= n ? n - 1 : y); }

// dst[i + factor·x] (+)= bilinear ×factor along the row `mid`, whose ends are repeated at -1 and n.
template <class T, int F>
void upsample_columns(const T* mid, T* __restrict dst, int64_t n, bool add) {
  constexpr int64_t L = Vec<T>::lanes;
  for_each_vector<T>(n, [&](int64_t x, int64_t k) {
    const Vec<T> left = load(mid + x - 1, k), here = load(mid + x, k), right = load(mid + x + 1, k);
    Vec<T> v[F], w[F];
#pragma GCC unroll 8
    for (int i = 0; i < F; ++i) {  // position i lies between left and here, or here and right
      const T t = static_cast<T>(2 * i + 1 - F) / static_cast<T>(2 * F);
      v[i] = t < 0 ? fma(Vec<T>(-t), left, Vec<T>(1 + t) * here) : fma(Vec<T>(t), right, Vec<T>(1 - t) * here);
    }
#pragma GCC unroll 8
    for (int half = F / 2; half > 0; half /= 2) {  // v[i] and v[i + F/2] become neighbours, and so on
#pragma GCC unroll 8
      for (int i = 0; i < F / 2; ++i) interleave(v[i], v[i + F / 2], w[2 * i], w[2 * i + 1]);
#pragma GCC unroll 8
      for (int i = 0; i < F; ++i) v[i] = w[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < F; ++i) {
      const int64_t count = F * k - i * L;
      if (count <= 0) break;
      T* p = dst + F * x + i * L;
      const int64_t lanes = count < L ? count : L;
      store(add ? v[i] + load(p, lanes) : v[i], p, lanes);
    }
  });
}
template <class T>
void upsample_columns(const T* mid, int64_t factor, T* dst, int64_t n, bool add) {
  if (factor == 2) return upsample_columns<T, 2>(mid, dst, n, add);
  if (factor == 4) return upsample_columns<T, 4>(mid, dst, n, add);
  upsample_columns<T, 8>(mid, dst, n, add);
}

// dst[x] (+)= bilinear ×factor of the blend of two coarse rows; line holds n + 2 items.
template <class T>
void upsample_row(const T* a, const T* b, T upper, int64_t factor, T* __restrict dst, int64_t n, T* line, bool add) {
  T* mid = line + 1;  // the blend, its ends repeated
  const Vec<T> wa(1 - upper), wb(upper);
  for_each_vector<T>(n, [&](int64_t x, int64_t k) { store(fma(wb, load(b + x, k), wa * load(a + x, k)), mid + x, k); });
  mid[-1] = mid[0];
  mid[n] = mid[n - 1];
  upsample_columns(mid, factor, dst, n, add);
}

// The gradient of an output scale as a coarser input scale sees it through the transpose of bilinear ×factor.
template <class T>
struct GradientMap {
  const T* data;
  int64_t channels, rows, cols;  // as stored (fine)
  int64_t factor;

  bool direct() const { return factor == 1; }
  int64_t out_rows() const { return rows / factor; }
  int64_t out_cols() const { return cols / factor; }
  static int64_t line(int64_t cols) { return 2 * cols + 32; }

  void row(int64_t c, int64_t y, T* __restrict dst, T* line) const {
    const T* plane = data + c * rows * cols;
    if (factor == 1) {
      std::memcpy(dst, plane + y * cols, cols * sizeof(T));
      return;
    }
    // Vertical: the 2·factor fine rows around coarse row y; a row that two clamped neighbours share counts twice.
    T* tall = line + factor;  // cols items, with room for half a window on both sides
    const int64_t n = out_rows(), m = out_cols(), first = y * factor - factor / 2;
    for (int64_t t = 0; t < 2 * factor; t += 4) {  // four rows a pass
      const T* fine[4];
      Vec<T> w[4];
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t r = first + t + k;
        const Between at = between(r < 0 ? 0 : r, factor);
        double weight = 0;
        if (r >= 0 && r < rows && clamp_to(at.lower, n) == y) weight += 1 - at.upper;
        if (r >= 0 && r < rows && clamp_to(at.lower + 1, n) == y) weight += at.upper;
        fine[k] = plane + (weight > 0 ? r : y * factor) * cols;  // weight 0 must not meet an infinity far away
        w[k] = Vec<T>(static_cast<T>(weight));
      }
      for_each_vector<T>(cols, [&](int64_t x, int64_t k) {
        Vec<T> v = t == 0 ? w[0] * load(fine[0] + x, k) : fma(w[0], load(fine[0] + x, k), load(tall + x, k));
        v = fma(w[1], load(fine[1] + x, k), v);
        v = fma(w[2], load(fine[2] + x, k), v);
        store(fma(w[3], load(fine[3] + x, k), v), tall + x, k);
      });
    }
    // Horizontal: outside the map there is nothing; the outer half windows then get the rest of their weight.
    for (int64_t x = 0; x < factor / 2; ++x) tall[-1 - x] = tall[cols + x] = 0;
    if (factor == 2) {
      for (int64_t x = 0; x < m; ++x)
        dst[x] = T(0.25) * (tall[2 * x - 1] + tall[2 * x + 2]) + T(0.75) * (tall[2 * x] + tall[2 * x + 1]);
    } else {
      for (int64_t x = 0; x < m; ++x) dst[x] = 0;
      for (int64_t t = 0; t < 2 * factor; ++t) {
        const T w = static_cast<T>((t < factor ? 2 * t + 1 : 4 * factor - 2 * t - 1)) / static_cast<T>(2 * factor);
        const T* from = tall + t - factor / 2;
        for (int64_t x = 0; x < m; ++x) dst[x] += w * from[x * factor];
      }
    }
    for (int64_t t = 0; t < factor / 2; ++t) {
      const T rest = 1 - static_cast<T>(factor + 2 * t + 1) / static_cast<T>(2 * factor);
      dst[0] += rest * tall[t];
      dst[m - 1] += rest * tall[cols - 1 - t];
    }
  }
};

}  // namespace
}  // namespace sodfast
