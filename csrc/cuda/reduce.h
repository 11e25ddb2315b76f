// Sums over the threads of a warp or a block, in a fixed order.
#pragma once

#include "cuda/numbers.h"

namespace sodfast::cuda {

constexpr unsigned whole_warp = 0xffffffffu;

// The sum over the warp, the same in every lane.
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(whole_warp, x, mask);
  return x;
}

// n sums over a block of `warps` warps, the same in every thread. `shared` holds warps * n values; all threads call.
template <int n, class A>
__device__ __forceinline__ void block_sums(A (&x)[n], A* shared, int warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    x[k] = warp_sum(x[k]);
    if (lane == 0) shared[warp * n + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < n; ++k) {
    A total = 0;
    for (int w = 0; w < warps; ++w) total += shared[w * n + k];
    x[k] = total;
  }
  __syncthreads();
}

}  // namespace sodfast::cuda
