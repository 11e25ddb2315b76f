// The moments of planes that a kernel writes in tiles: it leaves those of every tile, and a launch combines them.
#pragma once

#include "cuda/planes.h"

namespace sodfast::cuda {

// The moments of planes from those of their tiles, n_rows x n_cols pixels each but at the edges: a warp per plane.
struct TileMoments {
  Pyramid maps;
  int n_rows, n_cols;
  int64_t first[max_scales + 1];  // of a scale: of what is below, in tiles
  double *tiles, *planes;         // [channel][sample][tile], [channel][sample]: mean and m2
  __host__ __device__ int64_t across(int s) const { return divide_up<int64_t>(maps.cols(s), n_cols); }
  __host__ __device__ int64_t count(int s) const { return across(s) * divide_up<int64_t>(maps.rows(s), n_rows); }
  __device__ __forceinline__ double* of(int s, int64_t c, int64_t b, int64_t tile) const {
    return tiles + (first[s] + (c * maps.batch + b) * count(s) + tile) * 2;
  }
};
inline TileMoments tile_moments(const Pyramid& maps, int n_rows, int n_cols) {
  TileMoments m{maps, n_rows, n_cols, {}, nullptr, nullptr};
  for (int s = 0; s < maps.scales; ++s) m.first[s + 1] = m.first[s] + maps.channels[s] * maps.batch * m.count(s);
  return m;
}

static __global__ void __launch_bounds__(threads) combine_tiles(const __grid_constant__ TileMoments m) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  if (plane >= m.maps.batch * m.maps.total()) return;
  int64_t b;
  const int64_t channel = divide(plane, m.maps.batch, b);
  int s = 0;
  while (channel >= m.maps.begin(s + 1)) ++s;
  Moments moments;
  for (int64_t tile = lane; tile < m.count(s); tile += 32) {
    int64_t x;
    const int64_t y = divide(tile, m.across(s), x);
    const double* p = m.of(s, channel - m.maps.begin(s), b, tile);
    const int64_t pixels = least<int64_t>(m.n_rows, m.maps.rows(s) - y * m.n_rows) *
                           least<int64_t>(m.n_cols, m.maps.cols(s) - x * m.n_cols);
    moments.add(static_cast<double>(pixels), p[0], p[1]);
  }
  moments.add_up();
  if (lane == 0) m.planes[plane * 2] = moments.mean, m.planes[plane * 2 + 1] = moments.m2;
}

}  // namespace sodfast::cuda
