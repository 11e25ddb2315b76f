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

// n sums over a block of `warps` warps, the same in every thread. All threads call, with room for warps * n values in
// `shared` that nobody uses before the next barrier.
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
}

// Sums over blocks in two launches, in float64: each block writes its threads' n sums to partial[block][n] …
template <int warps, int n, class A>
__device__ __forceinline__ void write_partial(const A (&of_thread)[n], double* partial) {
  __shared__ double shared[warps * n];
  double total[n];
#pragma unroll
  for (int k = 0; k < n; ++k) total[k] = of_thread[k];
  block_sums(total, shared, warps);
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int k = 0; k < n; ++k) partial[static_cast<int64_t>(blockIdx.x) * n + k] = total[k];
}

// … and then one block for every `slices` of them adds theirs up; the same in every thread.
template <int warps, int n>
__device__ __forceinline__ void add_partials(const double* partial, int64_t slices, double (&total)[n]) {
  __shared__ double shared[warps * n];
  const double* from = partial + static_cast<int64_t>(blockIdx.x) * slices * n;
#pragma unroll
  for (int k = 0; k < n; ++k) total[k] = 0;
  for (int64_t s = static_cast<int64_t>(threadIdx.x); s < slices; s += 32 * warps) {
#pragma unroll
    for (int k = 0; k < n; ++k) total[k] += from[s * n + k];
  }
  block_sums(total, shared, warps);
}

}  // namespace sodfast::cuda
