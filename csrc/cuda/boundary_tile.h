// The thick boundary of a tile of a soft map, made in shared memory.
//
//   t = z - erode₃(z)   or   dilate₃(z) - z   or   dilate₃(z) - erode₃(z)         b = max-pool_k(t)
//
// A block has 64 x 64 pixels of b and makes t around them. t is never negative, so its bits are whole numbers of the
// same order, NaN above all: maxima are maxima of integers, and -1 lies outside of the map. The pool runs along the
// rows, then down the columns, a thread making eight windows that overlap from what they share and what only some of
// them have: (k + 7) / 8 reads and some (k + 20) / 8 maxima per window.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/numbers.h"

namespace sodfast::cuda {

constexpr int boundary_threads = 256, boundary_side = 64, most_radius = 15;
constexpr int boundary_around = boundary_side + 2 * most_radius, boundary_pitch = boundary_around + 1;  // odd: no banks
constexpr int windows = 8;                                                    // that a thread makes at once
constexpr int per_thread = boundary_side * boundary_side / boundary_threads;  // pixels: 16 of a column

// Integers in the order of numbers that are not negative.
template <class A>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <class A>
using Key = typename KeyOf<A>::type;

template <class A>
__device__ __forceinline__ Key<A> key_of(A x) {
  Key<A> bits;
  memcpy(&bits, &x, sizeof x);
  return bits & ~(Key<A>(1) << (8 * sizeof x - 1));
}
template <class A>
__device__ __forceinline__ A value_of(Key<A> key) {
  A x;
  memcpy(&x, &key, sizeof x);
  return x;
}

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
#ifdef __CUDA_ARCH__  // five instructions in place of forty; off by some 2e-7 at most, by the errors that CUDA's manual
                      // gives
  return __fdividef(A(1), 1 + __expf(-x));
#else
  return 1 / (1 + exp(-x));
#endif
}

__device__ __forceinline__ int clamp(int i, int n) { return i < 0 ? 0 : i < n ? i : n - 1; }

// A plane and the tile of a block. With `logistic` the map is sigmoid(z): the extremes of a window are those of z.
template <class T, bool logistic>
struct BoundaryTile {
  using A = typename Sum<T>::type;
  const T* z;
  int rows, cols, k, thin;
  int y0, x0;

  // t around the tile, from (y0 - k / 2, x0 - k / 2) on.
  __device__ __forceinline__ void make_thin(Key<A>* tile) const {
    const int radius = k / 2, around = boundary_side + 2 * radius, parts = divide_up(around, windows);
    for (int e = static_cast<int>(threadIdx.x); e < around * parts; e += boundary_threads) {
      const int part = e / around, c = e - part * around, x = x0 - radius + c, first = part * windows;
      const int y = y0 - radius + first, left = clamp(x - 1, cols), middle = clamp(x, cols), right = clamp(x + 1, cols);
      const bool inside = x >= 0 && x < cols;
      A low[3] = {}, high[3] = {}, centre[2] = {};  // of the rows before, here and after
#pragma unroll 5
      for (int i = -2; i < windows; ++i) {
        const T* row = z + static_cast<int64_t>(clamp(y + i + 1, rows)) * cols;
        const A a = widen(row[left]), b = widen(row[middle]), d = widen(row[right]);
        low[0] = low[1], low[1] = low[2], low[2] = smaller(smaller(a, b), d);
        high[0] = high[1], high[1] = high[2], high[2] = larger(larger(a, b), d);
        centre[0] = centre[1], centre[1] = b;
        if (i < 0 || first + i >= around) continue;
        const A lowest = thin & thin_erosion ? smaller(smaller(low[0], low[1]), low[2]) : centre[0];
        const A highest = thin & thin_dilation ? larger(larger(high[0], high[1]), high[2]) : centre[0];
        const A t = logistic ? sigmoid(highest) - sigmoid(lowest) : highest - lowest;
        tile[(first + i) * boundary_pitch + c] = inside && y + i >= 0 && y + i < rows ? key_of(t) : Key<A>(-1);
      }
    }
  }
};

// Window j is positions j to j + k - 1: its maximum, and with `track` how far in it comes first.
template <int k, bool track, class K, class Read>
__device__ __forceinline__ void pool_small(const Read& read, K (&best)[windows], int (&place)[windows]) {
  K v[windows + k - 1];
#pragma unroll
  for (int i = 0; i < windows + k - 1; ++i) v[i] = read(i);
#pragma unroll
  for (int j = 0; j < windows; ++j) {
    best[j] = v[j], place[j] = 0;
#pragma unroll
    for (int i = 1; i < k; ++i) {
      if (track && v[j + i] > best[j]) place[j] = i;
      best[j] = v[j + i] > best[j] ? v[j + i] : best[j];
    }
  }
}

template <bool track, class K, class Read>
__device__ __forceinline__ void pool(int k, const Read& read, K (&best)[windows], int (&place)[windows]) {
  if (k < windows) {
    switch (k) {
      case 1:
        return pool_small<1, track>(read, best, place);
      case 3:
        return pool_small<3, track>(read, best, place);
      case 5:
        return pool_small<5, track>(read, best, place);
      default:
        return pool_small<7, track>(read, best, place);
    }
  }
  // What all windows share, then what those from j on lack on the left, then what those up to j have on the right.
  K shared = read(windows - 1);
  int at = windows - 1;
  for (int i = windows; i < k; ++i) {
    const K v = read(i);
    if (track && v > shared) at = i;
    shared = v > shared ? v : shared;
  }
  best[windows - 1] = shared, place[windows - 1] = at;
#pragma unroll
  for (int j = windows - 2; j >= 0; --j) {
    const K v = read(j);
    if (track) place[j] = v >= best[j + 1] ? j : place[j + 1];
    best[j] = v >= best[j + 1] ? v : best[j + 1];
  }
  shared = -1, at = 0;
#pragma unroll
  for (int j = 1; j < windows; ++j) {
    const K v = read(k + j - 1);
    if (track && v > shared) at = k + j - 1;
    shared = v > shared ? v : shared;
    if (track && shared > best[j]) place[j] = at;
    best[j] = shared > best[j] ? shared : best[j];
  }
  if (track) {
#pragma unroll
    for (int j = 0; j < windows; ++j) place[j] -= j;
  }
}

// Makes tile the maxima of k along the rows; calls note(row of the tile's surroundings, first column, places).
template <bool track, class K, class Note>
__device__ __forceinline__ void pool_rows(int k, K* tile, const Note& note) {
  const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * windows;
  const int around = boundary_side + k - 1;
  for (int top = 0; top < around; top += 32) {
    K best[windows];
    int place[windows];
    K* line = tile + (top + lane) * boundary_pitch + first;
    if (top + lane < around) pool<track>(k, [&](int i) { return line[i]; }, best, place);
    __syncthreads();
    if (top + lane < around) {
#pragma unroll
      for (int j = 0; j < windows; ++j) line[j] = best[j];
      if (track) note(top + lane, first, place);
    }
  }
  __syncthreads();
}

// Where this thread's pixels are in the tile: one below the other.
__device__ __forceinline__ int my_col() { return static_cast<int>(threadIdx.x) % boundary_side; }
__device__ __forceinline__ int my_row(int i) { return static_cast<int>(threadIdx.x) / boundary_side * per_thread + i; }

// The maxima of k down the columns at this thread's pixels.
template <bool track, class K>
__device__ __forceinline__ void pool_cols(int k, const K* tile, K (&best)[per_thread], int (&place)[per_thread]) {
#pragma unroll
  for (int half = 0; half < per_thread; half += windows) {
    const K* column = tile + my_row(half) * boundary_pitch + my_col();
    K b[windows];
    int p[windows];
    pool<track>(k, [&](int i) { return column[i * boundary_pitch]; }, b, p);
#pragma unroll
    for (int j = 0; j < windows; ++j) best[half + j] = b[j], place[half + j] = p[j];
  }
}

// The thick boundary at this thread's pixels. All threads of the block call; `tile` may be used again after a barrier.
template <class T, bool logistic>
__device__ __forceinline__ void thick_boundary(const BoundaryTile<T, logistic>& of, Key<typename Sum<T>::type>* tile,
                                               Key<typename Sum<T>::type> (&best)[per_thread]) {
  int unused[per_thread];
  of.make_thin(tile);
  __syncthreads();
  if (of.k > 1) pool_rows<false>(of.k, tile, [](int, int, const int (&)[windows]) {});
  pool_cols<false>(of.k, tile, best, unused);
}

}  // namespace sodfast::cuda
