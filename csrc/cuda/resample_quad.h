// Four pixels in a row of a map that is pooled or lowered on load: what resample.h has for one pixel, with the loads of
// all four in flight and, at a factor of 2 and aligned rows, 16 bytes each.
#pragma once

#include "cuda/resample.h"

namespace sodfast::cuda {

// The larger of both; NaN if one of them is.
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return b > a || b != b ? b : a;
}

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

// The same for four pixels inside, a factor of 2 and rows that are aligned and not averaged.
template <class T>
__device__ __forceinline__ Pack<typename Sum<T>::type, 4> halved_quad(const T* plane, int cols, int y, int x) {
  Pack<typename Sum<T>::type, 4> v;
  const T* p = plane + static_cast<int64_t>(2 * y) * cols + 2 * x;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Pack<T, 4> top = *reinterpret_cast<const Pack<T, 4>*>(p + 4 * h);
    const Pack<T, 4> bottom = *reinterpret_cast<const Pack<T, 4>*>(p + cols + 4 * h);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      v.v[2 * h + i] = larger(larger(widen(top.v[2 * i]), widen(top.v[2 * i + 1])),
                              larger(widen(bottom.v[2 * i]), widen(bottom.v[2 * i + 1])));
  }
  return v;
}

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

// The same for a factor of 2, four pixels inside and aligned rows.
template <class T>
__device__ __forceinline__ Pack<typename Sum<T>::type, 4> lowered_quad(const T* g, int rows, int cols, int y, int x) {
  using A = typename Sum<T>::type;
  Pack<A, 4> v{};
#pragma unroll 2
  for (int r = 0; r < 4; ++r) {
    const int i = 2 * y - 1 + r;
    if (static_cast<unsigned>(i) >= static_cast<unsigned>(2 * rows)) continue;
    const A u = lowered_weight<A>(r, 2, y, rows);
    const T* p = g + static_cast<int64_t>(i) * 2 * cols + 2 * x;
    A fine[10];  // columns 2x - 1 to 2x + 8
    fine[0] = x > 0 ? widen(p[-1]) : A(0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Pack<T, 4> quad = *reinterpret_cast<const Pack<T, 4>*>(p + 4 * h);
#pragma unroll
      for (int k = 0; k < 4; ++k) fine[1 + 4 * h + k] = widen(quad.v[k]);
    }
    fine[9] = x + 4 < cols ? widen(p[8]) : A(0);
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int t = 0; t < 4; ++t) v.v[c] += u * lowered_weight<A>(t, 2, x + c, cols) * fine[2 * c + t];
  }
  return v;
}

}  // namespace sodfast::cuda
