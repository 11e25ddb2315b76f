// Where the positions of one axis of SCFM's x lie between those of y.
//
//   position d of x lies at ((2 d + 1) n - N) / 2N of y          n positions of y, N of x
//
// Places are exact: whole numbers are divided, and the rest is the weight.
#pragma once

#include "cuda/numbers.h"

namespace sodfast::cuda {
namespace {

// One axis: N positions of x, n of y. Twice a side fits 31 bits.
struct Axis {
  int large, small;  // N, n
  int step;          // from a position to the next: 2n = step · 2N + rest
  unsigned rest;

  // The first position of x that lies at coarse position i or beyond.
  __device__ __forceinline__ int first_at(int i) const {
    if (i <= 0) return 0;
    int64_t unused;
    const int64_t d = divide((2 * static_cast<int64_t>(i) + 1) * large + small - 1, 2 * static_cast<int64_t>(small),
                             unused);  // ⌈((2 i + 1) N - n) / 2n⌉
    return static_cast<int>(least<int64_t>(d, large));
  }
};

// Where a position of x lies: between `first` of y and the next one, which weighs `part`.
template <class A>
struct Place {
  int below;  // -1 before the first
  unsigned rest;
  __device__ __forceinline__ Place(const Axis& axis, int d) {
    int64_t r;
    const int64_t twice = 2 * static_cast<int64_t>(axis.large);
    below = static_cast<int>(divide((2 * static_cast<int64_t>(d) + 1) * axis.small + axis.large, twice, r)) - 1;
    rest = static_cast<unsigned>(r);
  }
  __device__ __forceinline__ void next(const Axis& axis) {
    below += axis.step, rest += axis.rest;
    if (rest >= 2u * static_cast<unsigned>(axis.large)) ++below, rest -= 2u * static_cast<unsigned>(axis.large);
  }
  __device__ __forceinline__ int first() const { return below < 0 ? 0 : below; }
  __device__ __forceinline__ A part(A per_rest) const { return below < 0 ? A(0) : A(rest) * per_rest; }
};

Axis axis_of(int64_t large, int64_t small) {
  return {static_cast<int>(large), static_cast<int>(small), static_cast<int>(small / large),
          static_cast<unsigned>(2 * (small % large))};
}

// What a position weighs in coarse position i, one of the two that it is between. Beyond the last is the last.
template <class A>
__device__ __forceinline__ A weight_of(int first, A part, int i, int last) {
  return first < i ? part : i == last ? A(1) : 1 - part;
}

}  // namespace
}  // namespace sodfast::cuda
