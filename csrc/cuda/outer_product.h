// Gradients to the weights of dense convolutions: gW[row][col] = Σ over samples and pixels of g[row] · x[col], where
// col counts input channels times taps and both are functions of a pixel (a map pooled, lowered or shifted on load).
//
// A block takes a patch of 8·R rows x 32 columns and a slice of the pixels, 8 x 16 at a time through shared memory;
// a warp takes one row of pixels, a thread R x 4 products in registers. The slices' sums lie in a workspace
// [slice][weight] and a second launch adds them in a fixed order: no atomics, the same bits on every run.
//
// 2·rows·cols FLOPs per pixel; a tile of g is read once per 32 columns, one of x once per 8·R rows, mostly from L2.
// At 32 x 32 that is 1024 multiply-adds per 64 loads of the staging: float32 arithmetic bounds it from some 30
// channels on, memory below.
#pragma once

#include "cuda/slices.h"

namespace sodfast::cuda {

constexpr int outer_rows = 8, outer_cols = 16, outer_pixels = outer_rows * outer_cols;
constexpr int outer_threads = 256, patch_cols = 32, outer_pitch = outer_pixels + 1;

// One patch's place: pixels of batch x rows x cols, and where its sums go.
struct Patch {
  int64_t batch;
  int rows, cols;      // of the maps
  int n_rows, n_cols;  // of the patch; outside there is nothing
  int64_t out, pitch;  // first weight, and the distance of two rows' weights
};

// Problem: `Patch patch(block)`, and, for a pixel inside, `A row(patch state, r, b, y, x)` and `A col(…)`.
template <class Problem, int R>
__global__ void __launch_bounds__(outer_threads)
    outer_product(const __grid_constant__ Problem problem, typename Problem::A* workspace, int64_t weights,
                  int64_t slices) {
  using A = typename Problem::A;
  constexpr int patch_rows = 4 * R;
  __shared__ A tiles[(patch_rows + patch_cols) * outer_pitch];
  A* const g_tile = tiles;
  A* const x_tile = tiles + patch_rows * outer_pitch;
  int64_t slice;
  const int64_t block = divide(blockIdx.x, slices, slice);
  const typename Problem::Place place = problem.place(block);
  const Patch patch = problem.patch(place);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int r0 = lane / 8 * R, c0 = lane % 8 * 4;
  const int64_t tiles_x = divide_up(patch.cols, outer_cols), tiles_y = divide_up(patch.rows, outer_rows);
  const int64_t all = patch.batch * tiles_x * tiles_y, end = (slice + 1) * all / slices;
  A sum[R][4] = {};
  for (int64_t tile = slice * all / slices; tile < end; ++tile) {
    int64_t tx, ty;
    const int64_t b = divide(divide(tile, tiles_x, tx), tiles_y, ty);
    const int x0 = static_cast<int>(tx) * outer_cols, y0 = static_cast<int>(ty) * outer_rows;
    for (int e = static_cast<int>(threadIdx.x); e < (patch_rows + patch_cols) * outer_pixels; e += outer_threads) {
      const int line = e / outer_pixels, pixel = e % outer_pixels;
      const int y = y0 + pixel / outer_cols, x = x0 + pixel % outer_cols;
      A value = 0;
      if (y < patch.rows && x < patch.cols) {
        if (line < patch_rows) {
          if (line < patch.n_rows) value = problem.row(place, line, b, y, x);
        } else if (line - patch_rows < patch.n_cols) {
          value = problem.col(place, line - patch_rows, b, y, x);
        }
      }
      tiles[line * outer_pitch + pixel] = value;
    }
    __syncthreads();
    if (r0 < patch.n_rows && c0 < patch.n_cols) {
      for (int p = warp * outer_cols; p < (warp + 1) * outer_cols; ++p) {
        A g[R], x[4];
#pragma unroll
        for (int r = 0; r < R; ++r) g[r] = g_tile[(r0 + r) * outer_pitch + p];
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] = x_tile[(c0 + c) * outer_pitch + p];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][c] += g[r] * x[c];
      }
    }
    __syncthreads();
  }
  // The eight warps' sums, one product after the other through shared memory.
  A* const warps = tiles;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) warps[warp * 128 + c * 32 + lane] = sum[r][c];
    __syncthreads();
    if (threadIdx.x < 128) {
      A total = 0;
      for (int w = 0; w < outer_threads / 32; ++w) total += warps[w * 128 + static_cast<int>(threadIdx.x)];
      const int row = lane / 8 * R + r, col = lane % 8 * 4 + warp;  // threadIdx.x = c * 32 + lane: warp is c
      if (row < patch.n_rows && col < patch.n_cols)
        workspace[slice * weights + patch.out + row * patch.pitch + col] = total;
    }
    __syncthreads();
  }
}

}  // namespace sodfast::cuda
