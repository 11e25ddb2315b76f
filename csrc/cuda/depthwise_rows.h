// Rows of a plane as a thread of a 3x3 convolution reads them: four pixels and a neighbour on either side.
#pragma once

#include "cuda/reduce.h"

namespace sodfast::cuda {

constexpr int lane_pixels = 4;

// Reads row y, columns x - 1 to x + 4, of a plane; zero outside.
template <class T, class A>
__device__ __forceinline__ void read_row(const T* plane, int y, int x, int rows, int cols, bool aligned, A (&v)[6]) {
  if (y < 0 || y >= rows) {
#pragma unroll
    for (int i = 0; i < 6; ++i) v[i] = 0;
    return;
  }
  const T* p = plane + static_cast<int64_t>(y) * cols + x;
  v[0] = x > 0 ? widen(p[-1]) : A(0);
  if (aligned) {
    const Pack<T, lane_pixels> middle = *reinterpret_cast<const Pack<T, lane_pixels>*>(p);
#pragma unroll
    for (int i = 0; i < lane_pixels; ++i) v[1 + i] = widen(middle.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < lane_pixels; ++i) v[1 + i] = x + i < cols ? widen(p[i]) : A(0);
  }
  v[5] = x + 4 < cols ? widen(p[4]) : A(0);
}

// Rows y to y + n - 1 of pixels x to x + 3 as they are stored, all asked for at once; zero outside the plane.
template <bool aligned, int n, class T>
__device__ __forceinline__ void read_quads(const T* plane, int y, int x, int rows, int cols,
                                           Pack<T, lane_pixels> (&v)[n]) {
  int64_t at = static_cast<int64_t>(y) * cols + x;
#pragma unroll
  for (int r = 0; r < n; ++r, at += cols) {
    const bool inside = static_cast<unsigned>(y + r) < static_cast<unsigned>(rows);
    if (aligned) {
      Words<T, lane_pixels> words{};
      if (inside) words = words_at<lane_pixels>(plane + at);
      v[r] = pack_of(words);
    } else {
      v[r] = {};
#pragma unroll
      for (int i = 0; i < lane_pixels; ++i)
        if (inside && x + i < cols) v[r].v[i] = plane[at + i];
    }
  }
}

// A row's four pixels from x on and a neighbour on either side, which the lanes beside have; zero outside the plane.
// All lanes of the warp call.
template <class A>
__device__ __forceinline__ void with_neighbours(const A (&four)[lane_pixels], int x, int cols, A (&v)[6]) {
  const unsigned lane = threadIdx.x % 32;
  const A left = __shfl_sync(whole_warp, four[lane_pixels - 1], (lane + 31) % 32),
          right = __shfl_sync(whole_warp, four[0], (lane + 1) % 32);
  v[0] = x > 0 ? left : A(0), v[5] = x + lane_pixels < cols ? right : A(0);
#pragma unroll
  for (int i = 0; i < lane_pixels; ++i) v[1 + i] = four[i];
}

}  // namespace sodfast::cuda
