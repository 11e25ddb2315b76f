// Sums over samples and pixels in two launches: blocks write the sums of their slice to a workspace [slice][weight],
// and add_slices adds them in a fixed order. No atomics: the same bits on every run.
#pragma once

#include "cuda/numbers.h"

namespace sodfast::cuda {

// Where the sums go: tensors one after the other in the workspace's order, one per scale at most.
template <class T>
struct Segments {
  T* data[max_scales];
  int64_t first[max_scales + 1];
  int count;
};

// A block adds eight weights up: 32 threads each take every 32nd slice of one (a sector of memory holds the eight), and
// the first of them adds what they have.
constexpr int added_weights = 8, adders = 32;

template <class T>
__global__ void __launch_bounds__(added_weights* adders)
    add_slices(const __grid_constant__ Segments<T> out, const typename Sum<T>::type* workspace, int64_t slices) {
  using A = typename Sum<T>::type;
  __shared__ A shared[adders][added_weights];
  const int weight = static_cast<int>(threadIdx.x) % added_weights,
            adder = static_cast<int>(threadIdx.x) / added_weights;
  const int64_t weights = out.first[out.count], i = static_cast<int64_t>(blockIdx.x) * added_weights + weight;
  A total = 0;
  if (i < weights) {
#pragma unroll 4
    for (int64_t s = adder; s < slices; s += adders) total += workspace[s * weights + i];
  }
  shared[adder][weight] = total;
  __syncthreads();
  if (adder > 0 || i >= weights) return;
  for (int n = 1; n < adders; ++n) total += shared[n][weight];
  int k = 0;
  while (i >= out.first[k + 1]) ++k;
  narrow(total, out.data[k][i - out.first[k]]);
}

template <class T>
cudaError_t add_all_slices(const Segments<T>& out, const typename Sum<T>::type* workspace, int64_t slices,
                           cudaStream_t stream) {
  return launch(add_slices<T>, divide_up<int64_t>(out.first[out.count], added_weights), added_weights * adders, stream,
                out, workspace, slices);
}

// How many slices: enough blocks to fill a large GPU a few times over, a tile or more in each, and a bounded
// workspace. A function of the shape alone, so that results do not depend on the GPU.
inline int64_t slice_count(int64_t patches, int64_t tiles, int64_t weights) {
  constexpr int64_t blocks = 1024, most_values = int64_t(1) << 24;
  if (patches == 0 || weights == 0) return 1;
  int64_t slices = least(divide_up(blocks, patches), divide_up<int64_t>(tiles, 2));
  slices = least(slices, most_values / weights);
  return slices < 1 ? 1 : slices;
}

}  // namespace sodfast::cuda
