// Rows of a plane as a thread of a 3x3 convolution reads them: four pixels and a neighbour on either side.
#pragma once

#include "cuda/numbers.h"

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

// Reads rows y to y + n - 1 at once, columns x - 1 to x + 4; outside the plane the nearest pixel, so that no branch
// keeps one load waiting for another, and as they are stored, for the same reason.
template <int n, class T>
__device__ __forceinline__ void read_rows(const T* plane, int y, int x, int rows, int cols, bool aligned,
                                          T (&v)[n][6]) {
  const auto inside = [](int i, int size) { return least(i > 0 ? i : 0, size - 1); };
  const T* row[n];
#pragma unroll
  for (int r = 0; r < n; ++r) {
    row[r] = plane + static_cast<int64_t>(inside(y + r, rows)) * cols;
    v[r][0] = row[r][inside(x - 1, cols)], v[r][5] = row[r][inside(x + 4, cols)];
  }
#pragma unroll
  for (int r = 0; r < n; ++r) {
    if (aligned) {
      const Pack<T, lane_pixels> middle = *reinterpret_cast<const Pack<T, lane_pixels>*>(row[r] + x);
#pragma unroll
      for (int i = 0; i < lane_pixels; ++i) v[r][1 + i] = middle.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < lane_pixels; ++i) v[r][1 + i] = row[r][inside(x + i, cols)];
    }
  }
}

}  // namespace sodfast::cuda
