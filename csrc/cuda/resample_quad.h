// Four pixels in a row of a map that is pooled, raised or lowered on load: what resample.h has for one pixel, with the
// loads of all four in flight and, at a factor of 2 and aligned rows, 16 bytes each.
#pragma once

#include "cuda/resample.h"

namespace sodfast::cuda {

// Pixels x to x + n - 1 of row y of a plane that is rows x cols after the max-pool over f x f; zero outside.
template <int n, class T>
__device__ __forceinline__ void read_pooled(const Plane<T>& plane, int y, int x, int rows, int cols, int f,
                                            typename Sum<T>::type (&v)[n]) {
  using A = typename Sum<T>::type;
  const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(rows);
#pragma unroll
  for (int p = 0; p < n; ++p)
    v[p] = row_inside && static_cast<unsigned>(x + p) < static_cast<unsigned>(cols) ? A(-INFINITY) : A(0);
  if (!row_inside) return;
  for (int i = 0; i < f; ++i)
    for (int k = 0; k < f; ++k) {
#pragma unroll
      for (int p = 0; p < n; ++p)
        if (static_cast<unsigned>(x + p) < static_cast<unsigned>(cols))
          v[p] = larger(v[p], plane.at(y * f + i, (x + p) * f + k));
    }
}

// Pixels x to x + 3 of row y of a map of `cols` columns, an even number: the maxima of 2 x 2 of a plane with aligned
// rows of fine_cols. Zero past the row.
template <class T>
struct HalvedQuad {
  using A = typename Sum<T>::type;
  struct Stored {
    Words<T, 4> top[2], bottom[2];
  };
  int64_t at;
  int fine_cols;
  bool both;  // halves of the four exist
  __device__ __forceinline__ HalvedQuad(int fine_cols, int y, int x, int cols)
      : at(static_cast<int64_t>(2 * y) * fine_cols + 2 * x),
        fine_cols(fine_cols),
        both(x + 2 < cols) {}
  __device__ __forceinline__ Stored load(const T* plane) const {
    Stored stored{};
    const T* p = plane + at;
    stored.top[0] = words_at<4>(p), stored.bottom[0] = words_at<4>(p + fine_cols);
    if (both) stored.top[1] = words_at<4>(p + 4), stored.bottom[1] = words_at<4>(p + fine_cols + 4);
    return stored;
  }
  static __device__ __forceinline__ Pack<A, 4> finish(const Stored& stored) {
    Pack<A, 4> v;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      A top[4], bottom[4];
      widen(pack_of(stored.top[half]), top), widen(pack_of(stored.bottom[half]), bottom);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        v.v[2 * half + j] = larger(larger(top[2 * j], top[2 * j + 1]), larger(bottom[2 * j], bottom[2 * j + 1]));
    }
    return v;
  }
};

// Pixels x to x + 3 of row y of a map that is a plane, rows x cols with aligned pairs, upsampled by two; x is a
// multiple of four. Beyond its border the map goes on as it ends.
template <class T>
struct RaisedQuad {
  using A = typename Sum<T>::type;
  struct Stored {
    Words<T, 2> above, below;
    T beside[4];  // to the left above and below, to the right above and below
  };
  int64_t upper, lower;  // where the pair below the four begins, in the two rows that they are between
  A part;                // of the lower
  bool at_left, at_right;
  __device__ __forceinline__ RaisedQuad(int rows, int cols, int y, int x) {
    const Bilinear<A> v(y, 2, rows);
    const int c = x / 2;
    upper = static_cast<int64_t>(v.first) * cols + c, lower = static_cast<int64_t>(v.second) * cols + c, part = v.part;
    at_left = c == 0, at_right = c + 2 == cols;
  }
  __device__ __forceinline__ Stored load(const T* plane) const {
    const T *above = plane + upper, *below = plane + lower;
    Stored stored{};
    stored.above = words_at<2>(above), stored.below = words_at<2>(below);
    if (!at_left) stored.beside[0] = above[-1], stored.beside[1] = below[-1];
    if (!at_right) stored.beside[2] = above[2], stored.beside[3] = below[2];
    return stored;
  }
  __device__ __forceinline__ Pack<A, 4> finish(const Stored& stored) const {
    const Pack<T, 2> above = pack_of(stored.above), below = pack_of(stored.below);
    const auto between = [&](T a, T b) { return part > 0 ? (1 - part) * widen(a) + part * widen(b) : A(widen(a)); };
    A m[4] = {between(stored.beside[0], stored.beside[1]), between(above.v[0], below.v[0]),
              between(above.v[1], below.v[1]), between(stored.beside[2], stored.beside[3])};
    m[0] = at_left ? m[1] : m[0], m[3] = at_right ? m[2] : m[3];
    const A near = A(0.75), far = A(0.25);
    return {{far * m[0] + near * m[1], near * m[1] + far * m[2], far * m[1] + near * m[2], near * m[2] + far * m[3]}};
  }
};

// What fine pixel t of the 2 f that reach coarse pixel c of n weighs in it under the transpose of bilinear upsampling
// (align_corners=False). Beyond the map's border there is no neighbour to share with.
template <class A>
__device__ __forceinline__ A lowered_weight(int t, int f, int c, int n) {
  const A step = f == 2 ? A(0.5) : f == 4 ? A(0.25) : A(0.125);  // 1 / f without a division
  static_assert(max_scales == 4, "f is 2, 4 or 8");
  if (t < f) return c == 0 ? A(1) : (A(t) + A(0.5)) * step;
  return c == n - 1 ? A(1) : (A(2 * f - t) - A(0.5)) * step;
}

// What plane g, f times finer, gives pixels x to x + 3 of row y of the coarse one (rows x cols); zero outside.
template <class T>
__device__ __forceinline__ Pack<typename Sum<T>::type, 4> lowered_quad(const T* g, int rows, int cols, int y, int x,
                                                                       int f) {
  using A = typename Sum<T>::type;
  Pack<A, 4> v{};
#pragma unroll 1
  for (int r = 0; r < 2 * f; ++r) {
    const int i = y * f - f / 2 + r;
    if (static_cast<unsigned>(i) >= static_cast<unsigned>(rows * f)) continue;
    const A u = lowered_weight<A>(r, f, y, rows);
    const T* line = g + static_cast<int64_t>(i) * cols * f;
#pragma unroll 1
    for (int t = 0; t < 2 * f; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int k = (x + c) * f - f / 2 + t;
        if (static_cast<unsigned>(k) < static_cast<unsigned>(cols * f))
          v.v[c] += u * lowered_weight<A>(t, f, x + c, cols) * widen(line[k]);
      }
    }
  }
  return v;
}

// The same for a factor of 2, an even number of columns and aligned rows: 4 x 4 fine values to a pixel, weighed 1, 3,
// 3, 1 each way; the border takes what would have gone over it.
template <class T>
__device__ __forceinline__ Pack<typename Sum<T>::type, 4> lowered_quad(const T* g, int rows, int cols, int y, int x) {
  using A = typename Sum<T>::type;
  Pack<A, 4> v{};
  const T* p = g + static_cast<int64_t>(2 * y - 1) * (2 * cols) + 2 * x;
#pragma unroll 2
  for (int r = 0; r < 4; ++r, p += 2 * cols) {
    if ((y == 0 && r == 0) || (y == rows - 1 && r == 3)) continue;
    const A weight = lowered_weight<A>(r, 2, y, rows);
    A fine[10] = {};  // columns 2x - 1 to 2x + 8
    if (x > 0) fine[0] = widen(p[-1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (x + 2 * half >= cols) continue;
      const auto quad = *reinterpret_cast<const Pack<T, 4>*>(p + 4 * half);
#pragma unroll
      for (int j = 0; j < 4; ++j) fine[1 + 4 * half + j] = widen(quad.v[j]);
    }
    if (x + 4 < cols) fine[9] = widen(p[8]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (x + c / 2 * 2 >= cols) continue;
      const A left = x + c == 0 ? A(1) : A(0.75), right = x + c == cols - 1 ? A(1) : A(0.75);
      v.v[c] += weight * (A(0.25) * (fine[2 * c] + fine[2 * c + 3]) + left * fine[2 * c + 1] + right * fine[2 * c + 2]);
    }
  }
  return v;
}

}  // namespace sodfast::cuda
