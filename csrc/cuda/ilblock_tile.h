// A block's work in the fused ILBlock of ilblock.cu.
//
// A block has a tile of 14 x 28 pixels of one scale and sample, and up to 16 channels. The tile's u, with the two
// pixels around it that the depthwise layers read, is 18 x 32: a lane per column, a thread 6 rows of it times 8
// channels in registers while the input channels pass through shared memory, a chunk at a time, then all of it in
// shared memory. As in goctconv_tile.h a thread asks for several pixels before it stores the first, and at k = 1 a
// coarser source is upsampled on load. From there a warp goes down the rows of one channel with both depthwise layers
// in registers; neighbours' results of the first come by shuffles. Sizes fit CSNet's at 224 pixels: 224, 112, 56, 28
// are whole tiles, 14 is half of one.
#pragma once

#include "cuda/reduce.h"
#include "cuda/resample.h"
#include "cuda/tensor.h"

namespace sodfast::cuda {
namespace {

constexpr int tile_rows = 14, tile_cols = 28;
constexpr int window_rows = tile_rows + 4, window_cols = tile_cols + 4;
constexpr int window_pitch = window_rows * window_cols + 8;
constexpr int row_groups = 3, rows_per_thread = window_rows / row_groups, group_threads = 32 * row_groups;
constexpr int outs_per_thread = 8, most_groups = 2, most_outs = outs_per_thread * most_groups;
constexpr int warp_tiles = window_rows * window_cols / 8 / (row_groups * most_groups);  // of 16 channels and 8 pixels
constexpr int coarse_pixels = (window_rows / 2 + 2) * (window_cols / 2 + 2);            // of a source of half the size
constexpr int coarse_per_thread = divide_up(coarse_pixels, group_threads);
static_assert(tile_rows % 2 == 0 && rows_per_thread % 2 == 0, "a thread's first row is an even one");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int most_resident = 3;  // blocks on an SM with tensor cores: as many as have registers without spills
#else
constexpr int most_resident = 2;
#endif
constexpr int most_work = 256;  // in·k² up to which the launch is one

template <class T>
struct Layer {
  const T *weight, *bias, *slope;
};

// `from` and `to` at the sizes of the convolution; stored: the inputs' sizes in memory, twice that at stride 2.
template <class T>
struct Arguments {
  Pyramid from, to, stored;
  const T* sources[max_scales];
  T* targets[max_scales];
  bool pairs[max_scales];                                // rows of whole, aligned pairs
  int64_t from_begin[max_scales], to_begin[max_scales];  // first channel of a scale among all
  Layer<T> layers[3];
  int64_t weight_cols;  // input channels in all
  int stride, groups;
  BlockRanges blocks;
};

// tensor_cores: whether these multiply at k = 1.
template <class T, int k, bool tensor_cores>
struct Tile {
  using A = typename Sum<T>::type;
  static constexpr int k2 = k * k, halo = k / 2, chunk = k == 1 ? 16 : 8;
  static constexpr int staged_rows = window_rows + 2 * halo, staged_cols = window_cols + 2 * halo;
  static constexpr int plane = staged_rows * staged_cols + 4;  // no two of the channels that a warp reads in one bank

  // While the convolution adds up, and after it.
  struct Inputs {
    alignas(4 * sizeof(A)) A values[chunk][plane];
    alignas(4 * sizeof(A)) A weights[chunk * k2][most_outs + 4];  // whole 16 bytes, and not all rows in one bank
    A coarse[k == 1 ? 1 : most_outs][coarse_pixels + 1];
  };
  union Shared {
    Inputs in;
    A window[most_outs][window_pitch];
  };

  const Arguments<T>& a;
  Shared& shared;
  int s;             // target scale
  int64_t b;         // sample
  int y0, x0, out0;  // first row, column and channel of the tile
  int outs;          // channels of it, at most 16
  int group, row0;   // of this thread: which 8 channels, the first of 6 rows of the window
  int lane;          // its column
  A sum[rows_per_thread][outs_per_thread] = {};
  float products[tensor_cores ? warp_tiles : 1][4] = {};  // of this lane on tensor cores, as tensor.h has them

  __device__ __forceinline__ int rows() const { return static_cast<int>(a.to.rows(s)); }
  __device__ __forceinline__ int cols() const { return static_cast<int>(a.to.cols(s)); }
  __device__ __forceinline__ bool active() const { return group * outs_per_thread < outs; }

  __device__ __forceinline__ int64_t area(int i) const { return a.stored.area(i); }
  __device__ __forceinline__ const T* planes(int i, int64_t c) const {
    return a.sources[i] + (b * a.from.channels[i] + c) * area(i);
  }
  __device__ __forceinline__ A value(const T* plane, int i, int at, int y, int x) const {
    return seen_from(at, Plane<T>{plane, static_cast<int>(a.stored.cols(i)), a.stride == 2}, i,
                     static_cast<int>(a.from.rows(i)), static_cast<int>(a.from.cols(i)), y, x);
  }

  // Tensor cores take eight channels at once: what is missing of these is zero.
  static __device__ __forceinline__ int filled(int count) { return tensor_cores ? divide_up(count, 8) * 8 : count; }

  // k = 1, without a stride: each thread brings the rows of its column of every groups-th channel; read(plane, values)
  // fills what lies inside the map, zero is outside.
  template <class Read>
  __device__ __forceinline__ void bring(int i, int64_t c0, int count, const Read& read) {
    const T* plane = planes(i, c0 + group);
    const int64_t step = a.groups * area(i);
#pragma unroll 1
    for (int c = group; c < filled(count); c += a.groups, plane += step) {
      A values[rows_per_thread] = {};
      if (c < count) read(plane, values);
#pragma unroll
      for (int j = 0; j < rows_per_thread; ++j) shared.in.values[c][(row0 + j) * staged_cols + lane] = values[j];
    }
  }
  __device__ __forceinline__ void stage_rows(int i, int64_t c0, int count) {
    const int from_rows = static_cast<int>(a.from.rows(i)), from_cols = static_cast<int>(a.from.cols(i));
    const int y = y0 - 2 + row0, x = x0 - 2 + lane;
    unsigned here = 0;  // bit j: row y + j lies inside
#pragma unroll
    for (int j = 0; j < rows_per_thread; ++j)
      if (x >= 0 && x < cols() && y + j >= 0 && y + j < rows()) here |= 1u << j;
    const int64_t first = static_cast<int64_t>(y) * from_cols + x;
    if (i == s) {
      bring(i, c0, count, [&](const T* plane, A(&values)[rows_per_thread]) {
        int64_t at = first;
#pragma unroll
        for (int j = 0; j < rows_per_thread; ++j, at += from_cols)
          if (here >> j & 1) values[j] = widen(plane[at]);
      });
    } else if (i == s - 1 && a.pairs[i]) {
      bring(i, c0, count, [&](const T* plane, A(&values)[rows_per_thread]) {
        Words<T, 2> upper[rows_per_thread] = {}, lower[rows_per_thread] = {};
        int64_t at = 2 * first;
#pragma unroll
        for (int j = 0; j < rows_per_thread; ++j, at += 2 * from_cols)
          if (here >> j & 1) upper[j] = words_at<2>(plane + at), lower[j] = words_at<2>(plane + at + from_cols);
#pragma unroll
        for (int j = 0; j < rows_per_thread; ++j) {
          const Pack<T, 2> above = pack_of(upper[j]), below = pack_of(lower[j]);
          values[j] = larger(larger(A(widen(above.v[0])), A(widen(above.v[1]))),
                             larger(A(widen(below.v[0])), A(widen(below.v[1]))));
        }
      });
    } else if (i == s + 1) {  // y is even; beyond its border the map goes on as it ends
      const int top = y / 2 - 1, near = x > 0 ? least(x / 2, from_cols - 1) : 0;
      const int beside = near + (x % 2 != 0 ? 1 : -1), far = beside < 0 ? 0 : least(beside, from_cols - 1);
      bring(i, c0, count, [&](const T* plane, A(&values)[rows_per_thread]) {
        if (here == 0) return;
        A lines[rows_per_thread / 2 + 2];
        const T* p = plane + static_cast<int64_t>(top > 0 ? top : 0) * from_cols;
#pragma unroll
        for (int r = 0; r < rows_per_thread / 2 + 2; ++r) {
          lines[r] = A(0.75) * widen(p[near]) + A(0.25) * widen(p[far]);
          if (top + r >= 0 && top + r < from_rows - 1) p += from_cols;
        }
#pragma unroll
        for (int j = 0; j < rows_per_thread; ++j)
          if (here >> j & 1) values[j] = A(0.75) * lines[j / 2 + 1] + A(0.25) * lines[j / 2 + j % 2 * 2];
      });
    } else {
#pragma unroll 1
      for (int c = group; c < filled(count); c += a.groups)
#pragma unroll 1
        for (int j = 0; j < rows_per_thread; ++j) {
          const Plane<T> plane{planes(i, c0 + c), from_cols, false};
          shared.in.values[c][(row0 + j) * staged_cols + lane] =
              c < count && here >> j & 1 ? seen_from(s, plane, i, from_rows, from_cols, y + j, x) : A(0);
        }
    }
  }

  // k = 3: `count` channels of source i from c0 on, as scale `at` sees them, n_rows x n_cols pixels from (top, left)
  // on; zero outside the map.
  __device__ __forceinline__ void stage(int i, int64_t c0, int count, int at, int top, int left, int n_rows,
                                        int n_cols) {
    const int map_rows = static_cast<int>(a.to.rows(at)), map_cols = static_cast<int>(a.to.cols(at));
    const int64_t plane_area = area(i);
    const T* const first = planes(i, c0);
    for (int e = static_cast<int>(threadIdx.x); e < n_rows * n_cols; e += static_cast<int>(blockDim.x)) {
      const int r = e / n_cols, y = top + r, x = left + e - r * n_cols;
      const bool inside = y >= 0 && y < map_rows && x >= 0 && x < map_cols;
#pragma unroll 4
      for (int c = 0; c < count; ++c)
        shared.in.values[c][e] = inside ? value(first + c * plane_area, i, at, y, x) : A(0);
    }
  }

  // Their weights, [channel and tap][output]; zero past the last output.
  __device__ __forceinline__ void stage_weights(int i, int64_t c0, int count) {
    const int64_t source0 = a.from_begin[i] + c0, target0 = a.to_begin[s] + out0;
    for (int e = static_cast<int>(threadIdx.x); e < chunk * k2 * a.groups * outs_per_thread;
         e += static_cast<int>(blockDim.x)) {
      const int o = e / (chunk * k2), tap = e - o * (chunk * k2);
      shared.in.weights[tap][o] = tap < count * k2 && o < outs
                                      ? widen(a.layers[0].weight[((target0 + o) * a.weight_cols + source0) * k2 + tap])
                                      : A(0);
    }
  }

  // Adds what is staged to n pixels of this thread; at(p, dy, dx) is where pixel p's tap lies.
  template <int n, class At>
  __device__ __forceinline__ void multiply(int count, A (&sums)[n][outs_per_thread], const At& at) {
    for (int c = 0; c < count; ++c) {
#pragma unroll
      for (int dy = 0; dy < k; ++dy) {
#pragma unroll
        for (int dx = 0; dx < k; ++dx) {
          A x[n];
#pragma unroll
          for (int p = 0; p < n; ++p) x[p] = shared.in.values[c][at(p, dy, dx)];
          const auto* w =
              reinterpret_cast<const Pack<A, 4>*>(&shared.in.weights[c * k2 + dy * k + dx][group * outs_per_thread]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Pack<A, 4> weights = w[half];
#pragma unroll
            for (int o = 0; o < 4; ++o)
#pragma unroll
              for (int p = 0; p < n; ++p) sums[p][4 * half + o] += weights.v[o] * x[p];
          }
        }
      }
    }
  }

  // The same of all pixels of the window and 16 channels on tensor cores; k = 1.
  __device__ __forceinline__ int warp_tile(int i) const {  // the first of its 8 pixels
    return (static_cast<int>(threadIdx.x) / 32 * warp_tiles + i) * 8;
  }
  __device__ __forceinline__ void multiply_tiles(int count) {
    const int g = lane / 4, t = lane % 4;
    for (int c = 0; c < count; c += 8) {
      const A *w = &shared.in.weights[c + 2 * t][g], *w_next = &shared.in.weights[c + 2 * t + 1][g];
      const A *x = &shared.in.values[c + 2 * t][g], *x_next = &shared.in.values[c + 2 * t + 1][g];
      const Fragment<T> channels{{w[0], w_next[0]}, {w[8], w_next[8]}};
#pragma unroll
      for (int i = 0; i < warp_tiles; ++i)
        multiply_add(products[i], channels, Pair<T>(x[warp_tile(i)], x_next[warp_tile(i)]));
    }
  }
  __device__ __forceinline__ void fill_window_from_tiles() {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int channel = g + 8 * m;
      if (channel >= outs) continue;
      const int64_t parameter = a.to_begin[s] + out0 + channel;
      const A bias = widen(a.layers[0].bias[parameter]), slope = widen(a.layers[0].slope[parameter]);
#pragma unroll
      for (int i = 0; i < warp_tiles; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int p = warp_tile(i) + 2 * t + j, y = y0 - 2 + p / window_cols, x = x0 - 2 + p % window_cols;
          const bool inside = y >= 0 && y < rows() && x >= 0 && x < cols();
          shared.window[channel][p] = inside ? prelu(products[i][2 * m + j] + bias, slope) : A(0);
        }
    }
  }

  // A source that is read at the target's pixels.
  __device__ __forceinline__ void add(int i) {
    for (int64_t c = 0; c < a.from.channels[i]; c += chunk) {
      const int count = static_cast<int>(least<int64_t>(chunk, a.from.channels[i] - c));
      recompute(lane), recompute(row0);
      stage_weights(i, c, count);
      if (k == 1)
        stage_rows(i, c, count);
      else
        stage(i, c, count, s, y0 - 2 - halo, x0 - 2 - halo, staged_rows, staged_cols);
      __syncthreads();
      recompute(lane), recompute(row0);
      if constexpr (tensor_cores)
        multiply_tiles(count);
      else if (active())
        multiply(count, sum, [&](int p, int dy, int dx) { return (row0 + p + dy) * staged_cols + lane + dx; });
      __syncthreads();
    }
  }

  // A source 2^shift times coarser: convolved at its own size, then read bilinearly.
  __device__ __forceinline__ void add_apart(int i) {
    const int shift = i - s, f = 1 << shift, pixel = static_cast<int>(threadIdx.x) % group_threads;
    const int top = ((y0 - 2) >> shift) - 1, left = ((x0 - 2) >> shift) - 1;
    const int n_rows = ((y0 + tile_rows + 1) >> shift) + 2 - top, n_cols = ((x0 + tile_cols + 1) >> shift) + 2 - left;
    const int pitch = n_cols + 2 * halo;
    int places[coarse_per_thread];
#pragma unroll
    for (int p = 0; p < coarse_per_thread; ++p) {
      const int q = pixel + p * group_threads;
      places[p] = q < n_rows * n_cols ? q / n_cols * pitch + q % n_cols : 0;
    }
    A sums[coarse_per_thread][outs_per_thread] = {};
    for (int64_t c = 0; c < a.from.channels[i]; c += chunk) {
      const int count = static_cast<int>(least<int64_t>(chunk, a.from.channels[i] - c));
      stage_weights(i, c, count);
      stage(i, c, count, i, top - halo, left - halo, n_rows + 2 * halo, pitch);
      __syncthreads();
      if (active()) multiply(count, sums, [&](int p, int dy, int dx) { return places[p] + dy * pitch + dx; });
      __syncthreads();
    }
#pragma unroll
    for (int p = 0; p < coarse_per_thread; ++p) {
      const int q = pixel + p * group_threads;
      if (q < n_rows * n_cols)
#pragma unroll
        for (int o = 0; o < outs_per_thread; ++o) shared.in.coarse[group * outs_per_thread + o][q] = sums[p][o];
    }
    __syncthreads();
    const int x = x0 - 2 + lane;
    if (active() && x >= 0 && x < cols()) {
      const Bilinear<A> h(x, f, cols() / f);
#pragma unroll
      for (int p = 0; p < rows_per_thread; ++p) {
        const int y = y0 - 2 + row0 + p;
        if (y < 0 || y >= rows()) continue;
        const Bilinear<A> v(y, f, rows() / f);
        const int upper = (v.first - top) * n_cols - left, lower = (v.second - top) * n_cols - left;
#pragma unroll
        for (int o = 0; o < outs_per_thread; ++o) {
          const A* m = shared.in.coarse[group * outs_per_thread + o];
          sum[p][o] +=
              mix(v, mix(h, m[upper + h.first], m[upper + h.second]), mix(h, m[lower + h.first], m[lower + h.second]));
        }
      }
    }
    __syncthreads();
  }

  // The convolution's result with its epilogue; zero outside the map, which is what the depthwise layers pad with.
  __device__ __forceinline__ void fill_window() {
    const int x = x0 - 2 + lane;
#pragma unroll
    for (int o = 0; o < outs_per_thread; ++o) {
      const int channel = group * outs_per_thread + o;
      if (channel >= outs) continue;
      const int64_t parameter = a.to_begin[s] + out0 + channel;
      const A bias = widen(a.layers[0].bias[parameter]), slope = widen(a.layers[0].slope[parameter]);
#pragma unroll
      for (int p = 0; p < rows_per_thread; ++p) {
        const int y = y0 - 2 + row0 + p;
        const bool inside = y >= 0 && y < rows() && x >= 0 && x < cols();
        shared.window[channel][(row0 + p) * window_cols + lane] = inside ? prelu(sum[p][o] + bias, slope) : A(0);
      }
    }
  }

  // One depthwise layer on its way down the rows: two rows of results are begun, the oldest is ready with each new row.
  struct Depthwise {
    A w[9], bias, slope, begun[2] = {};
    __device__ __forceinline__ Depthwise(const Layer<T>& layer, int64_t channel)
        : bias(widen(layer.bias[channel])),
          slope(widen(layer.slope[channel])) {
#pragma unroll
      for (int t = 0; t < 9; ++t) w[t] = widen(layer.weight[channel * 9 + t]);
    }
    __device__ __forceinline__ A row(A left, A middle, A right) {
      const A ready = begun[0] + w[6] * left + w[7] * middle + w[8] * right;
      begun[0] = begun[1] + w[3] * left + w[4] * middle + w[5] * right;
      begun[1] = w[0] * left + w[1] * middle + w[2] * right;
      return prelu(ready + bias, slope);
    }
  };

  // Both depthwise layers of one channel, by one warp; the outermost lanes have no neighbour, and nobody needs them.
  __device__ __forceinline__ void run_depthwise(int c) const {
    const int64_t channel = a.to_begin[s] + out0 + c;
    Depthwise first(a.layers[1], channel), second(a.layers[2], channel);
    const int x = x0 - 2 + lane;
    const bool inside = x >= 0 && x < cols(), stores = lane >= 2 && lane < window_cols - 2 && inside;
    const A* u = shared.window[c];
    T* out = a.targets[s] + (b * a.to.channels[s] + out0 + c) * a.to.area(s) + x;
#pragma unroll 2
    for (int r = 0; r < window_rows; ++r, u += window_cols) {
      const A middle = first.row(u[lane > 0 ? lane - 1 : 0], u[lane], u[lane < window_cols - 1 ? lane + 1 : lane]);
      const int y = y0 - 3 + r;  // of this result; the second layer's is one row above
      const A v = r >= 2 && y >= 0 && y < rows() && inside ? middle : A(0);
      const A left = __shfl_sync(whole_warp, v, (lane + 31) % 32), right = __shfl_sync(whole_warp, v, (lane + 1) % 32);
      const A result = second.row(left, v, right);
      if (r >= 4 && stores && y - 1 < rows()) narrow(result, out[static_cast<int64_t>(y - 1) * cols()]);
    }
  }
};

}  // namespace
}  // namespace sodfast::cuda
