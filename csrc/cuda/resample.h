// The maps of gOctConv as functions of one target pixel: pooled going down, bilinear going up, and the transpose of
// the latter. Rows and columns are 32-bit (one plane's side), offsets 64-bit.
#pragma once

#include "cuda/numbers.h"

namespace sodfast::cuda {

// One plane of a scale as the convolution sees it: after the 2x2 average of stride 2.
template <class T>
struct Plane {
  const T* data;
  int stored_cols;
  bool averaged;

  using A = typename Sum<T>::type;
  __device__ __forceinline__ A at(int y, int x) const {
    if (!averaged) return widen(data[static_cast<int64_t>(y) * stored_cols + x]);
    const T* p = data + static_cast<int64_t>(2 * y) * stored_cols + 2 * x;
    return (widen(p[0]) + widen(p[1]) + widen(p[stored_cols]) + widen(p[stored_cols + 1])) * A(0.25);
  }
  // The maximum over the f x f block of (y, x); NaN if there is one.
  __device__ __forceinline__ A pooled(int y, int x, int f) const {
    A best = at(y * f, x * f);
#pragma unroll 1  // what is pooled by two and aligned has faster ways; this one is small
    for (int i = 0; i < f; ++i)
#pragma unroll 2
      for (int k = 0; k < f; ++k) best = larger(best, at(y * f + i, x * f + k));
    return best;
  }
  // Whether (y, x) is the first maximum of its f x f block; of NaNs the last, as in torch.
  __device__ __forceinline__ bool is_maximum(int y, int x, int f) const {
    const int y0 = y - y % f, x0 = x - x % f;
    A best = at(y0, x0);
    int place = 0;
    for (int i = 0; i < f * f; ++i) {
      const A value = at(y0 + i / f, x0 + i % f);
      if (value > best || value != value) best = value, place = i;
    }
    return place == (y - y0) * f + x - x0;
  }
};

// Where a fine index reads on a coarse axis of n values, f times coarser (align_corners=False). At the border there is
// one value, and mix() leaves it alone: 0 · infinity would be NaN.
template <class A>
struct Bilinear {
  int first, second;
  A part;  // of the second
  __device__ __forceinline__ Bilinear(int i, int f, int n) {
    static_assert(max_scales == 4, "f is 1, 2, 4 or 8; a division would cost more than all the rest here");
    const A s = (A(i) + A(0.5)) * (f == 1 ? A(1) : f == 2 ? A(0.5) : f == 4 ? A(0.25) : A(0.125)) - A(0.5);
    first = s > 0 ? static_cast<int>(s) : 0;
    part = s > 0 ? s - A(first) : A(0);
    second = part > 0 ? least(first + 1, n - 1) : first;
  }
  // What a value at coarse index c weighs in the result.
  __device__ __forceinline__ A weight(int c) const { return (first == c ? 1 - part : 0) + (second == c ? part : 0); }
};

template <class A>
__device__ __forceinline__ A mix(const Bilinear<A>& place, A first, A second) {
  return place.part > 0 ? (1 - place.part) * first + place.part * second : first;
}

// A plane of scale i (rows x cols as the convolution sees it) at pixel (y, x) of scale `at`.
template <class T>
__device__ __forceinline__ typename Sum<T>::type seen_from(int at, const Plane<T>& plane, int i, int rows, int cols,
                                                           int y, int x) {
  if (i == at) return plane.at(y, x);
  if (i < at) return plane.pooled(y, x, 1 << (at - i));
  const Bilinear<typename Sum<T>::type> v(y, 1 << (i - at), rows), h(x, 1 << (i - at), cols);
  return mix(v, mix(h, plane.at(v.first, h.first), plane.at(v.first, h.second)),
             mix(h, plane.at(v.second, h.first), plane.at(v.second, h.second)));
}

// The transpose of bilinear upsampling: what the fine plane g (rows x cols, f times finer) gives coarse pixel (y, x).
template <class T>
__device__ __forceinline__ typename Sum<T>::type lowered(const T* g, int rows, int cols, int y, int x, int f) {
  using A = typename Sum<T>::type;
  if (f == 1) return widen(g[static_cast<int64_t>(y) * cols + x]);
  A sum = 0;
  const int y0 = y * f - f / 2, x0 = x * f - f / 2;
  for (int i = y0 < 0 ? 0 : y0; i < least(y0 + 2 * f, rows); ++i) {
    const A u = Bilinear<A>(i, f, rows / f).weight(y);
    A line = 0;
#pragma unroll 2
    for (int k = x0 < 0 ? 0 : x0; k < least(x0 + 2 * f, cols); ++k)
      line += Bilinear<A>(k, f, cols / f).weight(x) * widen(g[static_cast<int64_t>(i) * cols + k]);
    sum += u * line;
  }
  return sum;
}

}  // namespace sodfast::cuda
