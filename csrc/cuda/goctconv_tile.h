// A block's work in the cross-scale convolution of goctconv.cu: a tile of 16 x 16 pixels of one scale and sample and
// up to 32 output channels. A thread has 4 pixels of a row times 8 channels in registers: 64 threads share the pixels,
// up to 4 groups of them the channels. Input channels pass through shared memory, a chunk at a time.
//
// What keeps such a kernel slow is waiting, so a thread asks for all that it brings of a chunk before it stores the
// first of it: it works out where its pixels lie once, then reads them in channel after channel. Where rows are whole
// and aligned, four pixels are one access; the 2x2 max-pool and its counterpart on the way back have such a form too.
//
// At k = 1 a coarser source is upsampled on load and then like any other: W * up(x) = up(W * x). At k = 3, where the
// borders differ, and on the way back through a max-pool, which knows its maxima per output channel, it is convolved at
// its own size into shared memory and read from there.
#pragma once

#include "cuda/resample.h"
#include "cuda/tensor.h"
#include "cuda/tile_moments.h"

namespace sodfast::cuda {
namespace {

constexpr int side = 16, outs_per_thread = 8, pixels_per_thread = 4, most_groups = 4;
constexpr int quads_per_row = side / pixels_per_thread, group_threads = side * quads_per_row;  // 64
constexpr int most_outs = outs_per_thread * most_groups;
constexpr int coarse_side = side / 2 + 2, coarse_pixels = coarse_side * coarse_side;
constexpr int warp_tiles = 8;                // of 16 channels and 8 pixels, that a warp multiplies on tensor cores
constexpr int weight_pitch = most_outs + 4;  // whole 16 bytes, and not all rows in one bank

// `from` and `to` are the sides of this direction at the sizes of the convolution; stored: the inputs' sizes in
// memory, twice that at stride 2.
template <class T>
struct Arguments {
  Pyramid from, to, stored;
  const T* sources[max_scales];
  const T* inputs[max_scales];  // backward: where the maxima are
  T* targets[max_scales];
  bool quads[max_scales], input_quads[max_scales];       // their rows are whole, aligned fours of what is convolved
  int64_t from_begin[max_scales], to_begin[max_scales];  // first channel of a scale among all
  const T *weight, *bias, *slope;
  int64_t weight_cols;  // input channels in all
  int stride, groups;
  BlockRanges blocks;
  TileMoments moments;  // where they are asked for
};

template <class T, int k, bool backward>
struct Tile {
  using A = typename Sum<T>::type;
  using Quad = Pack<A, pixels_per_thread>;
  static constexpr int k2 = k * k, halo = k / 2, chunk = k == 1 ? 16 : 8;
  static constexpr int tile_side = side + 2 * halo, pitch = k == 1 ? side : side + 4;
  static constexpr bool coarse_apart = k != 1 || backward;
  static constexpr bool tensor_cores = sizeof(T) == 2;
  static constexpr int plane = tile_side * pitch + 4;  // = 4 mod 8: a warp reads 4 channels at 8 pixels, each its bank
  static constexpr int result_pitch = side * side + 4, result_rows = 16;
  static constexpr int room =
      chunk * plane > result_rows* result_pitch || !tensor_cores ? chunk * plane : result_rows * result_pitch;
  static constexpr int weights_per_thread = chunk * k2 * outs_per_thread / group_threads;
  static constexpr int unrolled = k == 1 ? 2 : 1;

  struct Shared {
    alignas(sizeof(Quad)) A values[room];  // [channel of the chunk][place]; after the last one, results
    alignas(sizeof(Quad)) A weights[chunk * k2][weight_pitch];
    A coarse[coarse_apart ? most_outs : 1][coarse_pixels + 1];
  };

  const Arguments<T>& a;
  Shared& shared;
  int s;             // target scale
  int64_t b;         // sample
  int y0, x0, out0;  // first row, column and channel of the tile
  int outs;          // channels of it, at most 32
  int group, pixel;  // of this thread
  A sum[pixels_per_thread][outs_per_thread] = {};
  float products[tensor_cores ? warp_tiles : 1][4] = {};  // of this lane, as tensor.h has them

  __device__ __forceinline__ int rows() const { return static_cast<int>(a.to.rows(s)); }
  __device__ __forceinline__ int cols() const { return static_cast<int>(a.to.cols(s)); }
  __device__ __forceinline__ int row() const { return y0 + pixel / quads_per_row; }
  __device__ __forceinline__ int col() const { return x0 + pixel % quads_per_row * pixels_per_thread; }
  __device__ __forceinline__ bool busy() const { return group * outs_per_thread < outs; }

  // ------------------------------------------------------------------------------------------------ sources
  __device__ __forceinline__ int64_t area(int i) const { return backward ? a.from.area(i) : a.stored.area(i); }
  __device__ __forceinline__ const T* planes(int i, int64_t c) const {
    return a.sources[i] + (b * a.from.channels[i] + c) * area(i);
  }

  // A plane of source scale i as scale `at` sees it at (y, x).
  __device__ __forceinline__ A value(const T* plane, int i, int at, int y, int x) const {
    const int from_rows = static_cast<int>(a.from.rows(i)), from_cols = static_cast<int>(a.from.cols(i));
    if (backward) return lowered(plane, from_rows, from_cols, y, x, 1 << (at - i));
    return seen_from(at, Plane<T>{plane, static_cast<int>(a.stored.cols(i)), a.stride == 2}, i, from_rows, from_cols, y,
                     x);
  }

  // This thread's four pixels of one plane. `plain`: at its own size.
  __device__ __forceinline__ Quad plain(const T* plane) const {
    Quad quad{};
    if (row() < rows() && col() < cols()) {
      const auto read = *reinterpret_cast<const Pack<T, 4>*>(plane + static_cast<int64_t>(row()) * cols() + col());
#pragma unroll
      for (int p = 0; p < 4; ++p) quad.v[p] = widen(read.v[p]);
    }
    return quad;
  }
  // The maxima of 2 x 2 of a plane twice as fine; NaN where there is one.
  __device__ __forceinline__ Quad pooled(const T* plane, int fine_cols) const {
    Quad quad{};
    const T* p = plane + static_cast<int64_t>(2 * row()) * fine_cols + 2 * col();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row() >= rows() || col() + 2 * half >= cols()) continue;
      const auto upper = *reinterpret_cast<const Pack<T, 4>*>(p + 4 * half),
                 lower = *reinterpret_cast<const Pack<T, 4>*>(p + fine_cols + 4 * half);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        quad.v[2 * half + j] = larger(larger(A(widen(upper.v[2 * j])), A(widen(upper.v[2 * j + 1]))),
                                      larger(A(widen(lower.v[2 * j])), A(widen(lower.v[2 * j + 1]))));
    }
    return quad;
  }
  // The transpose of upsampling by two: 4 x 4 values of the finer plane, weighed 1, 3, 3, 1 each way; the border takes
  // what would have gone over it.
  __device__ __forceinline__ Quad lowered_by_two(const T* plane, int fine_cols) const {
    Quad quad{};
    if (row() >= rows() || col() >= cols()) return quad;
    const T* p = plane + static_cast<int64_t>(2 * row() - 1) * fine_cols + 2 * col();
#pragma unroll 2
    for (int dy = 0; dy < 4; ++dy, p += fine_cols) {
      const bool over_top = row() == 0 && dy < 2, over_bottom = row() == rows() - 1 && dy >= 2;
      if ((over_top && dy == 0) || (over_bottom && dy == 3)) continue;
      const A weight = over_top || over_bottom ? A(1) : dy == 0 || dy == 3 ? A(0.25) : A(0.75);
      A v[2 * pixels_per_thread + 2] = {};
      if (col() > 0) v[0] = widen(p[-1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (col() + 2 * half >= cols()) continue;
        const auto read = *reinterpret_cast<const Pack<T, 4>*>(p + 4 * half);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[1 + 4 * half + j] = widen(read.v[j]);
      }
      if (col() + 4 < cols()) v[9] = widen(p[8]);
#pragma unroll
      for (int q = 0; q < pixels_per_thread; ++q) {
        const A left = col() + q == 0 ? A(1) : A(0.75), right = col() + q == cols() - 1 ? A(1) : A(0.75);
        quad.v[q] += weight * (A(0.25) * (v[2 * q] + v[2 * q + 3]) + left * v[2 * q + 1] + right * v[2 * q + 2]);
      }
    }
    return quad;
  }

  // ------------------------------------------------------------------------------------- into shared memory
  // Tensor cores take eight channels at once: what is missing of these is zero.
  static __device__ __forceinline__ int filled(int count) { return tensor_cores ? divide_up(count, 8) * 8 : count; }
  // k = 1: each thread brings its own pixels of every groups-th channel, `ahead` of them asked for at once; E: of which
  // type, a quad or one value.
  template <class E, int ahead, class Read>
  __device__ __forceinline__ void bring(const T* from, int64_t plane_area, int count, int p, const Read& read) {
    const int64_t step = a.groups * plane_area;
    from += group * plane_area;
#pragma unroll 1
    for (int c = group; c < filled(count); c += ahead * a.groups) {
      E values[ahead] = {};
#pragma unroll
      for (int j = 0; j < ahead; ++j, from += step)
        if (c + j * a.groups < count) values[j] = read(from);
#pragma unroll
      for (int j = 0; j < ahead; ++j)
        if (c + j * a.groups < filled(count))
          *reinterpret_cast<E*>(&shared.values[(c + j * a.groups) * plane + pixel * pixels_per_thread + p]) = values[j];
    }
  }
  __device__ __forceinline__ void stage_pixels(int i, int64_t c0, int count) {
    const T* const first = planes(i, c0);
    const int from_cols = static_cast<int>(a.from.cols(i));
    const bool whole = a.quads[i] && (backward || a.stride == 1);
    if (i == s && whole) return bring<Quad, 4>(first, area(i), count, 0, [&](const T* p) { return plain(p); });
    if (i == s - 1 && whole && (!backward || (from_cols == 2 * cols() && a.from.rows(i) == 2 * rows())))
      return bring<Quad, 1>(first, area(i), count, 0,
                            [&](const T* p) { return backward ? lowered_by_two(p, from_cols) : pooled(p, from_cols); });
#pragma unroll 1
    for (int p = 0; p < pixels_per_thread; ++p) {
      const int y = row(), x = col() + p;
      if (y >= rows() || x >= cols()) {
        bring<A, 4>(first, 0, count, p, [](const T*) { return A(0); });
      } else if (i > s && a.stride == 1) {
        const Bilinear<A> v(y, 1 << (i - s), static_cast<int>(a.from.rows(i))), h(x, 1 << (i - s), from_cols);
        const int64_t upper = int64_t(v.first) * from_cols, lower = int64_t(v.second) * from_cols;
        bring<A, 4>(first, area(i), count, p, [&](const T* plane) {
          const A above = mix(h, widen(plane[upper + h.first]), widen(plane[upper + h.second]));
          return mix(v, above, mix(h, widen(plane[lower + h.first]), widen(plane[lower + h.second])));
        });
      } else {
        bring<A, 1>(first, area(i), count, p, [&](const T* plane) { return value(plane, i, s, y, x); });
      }
    }
  }

  // One value of `count` channels, p: where it is in the first of them.
  template <int ahead, class Read>
  __device__ __forceinline__ void put(const T* p, int64_t plane_area, int count, int place, bool inside,
                                      const Read& read) {
#pragma unroll 1
    for (int c = 0; c < filled(count); c += ahead) {
      A values[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j, p += plane_area) values[j] = inside && c + j < count ? read(p) : A(0);
#pragma unroll
      for (int j = 0; j < ahead; ++j)
        if (c + j < filled(count)) shared.values[(c + j) * plane + place] = values[j];
    }
  }
  // Any k: `count` channels, n x n pixels from (top, left) on; zero outside.
  __device__ __forceinline__ void stage(int i, int64_t c0, int count, int at, int top, int left, int n, int n_pitch) {
    const int at_rows = static_cast<int>(a.to.rows(at)), at_cols = static_cast<int>(a.to.cols(at));
    const int row_pitch = static_cast<int>(backward ? a.from.cols(i) : a.stored.cols(i));
    const int side_read = backward ? (i == at ? 1 : 0) : a.stride << (at - i);  // stored pixels per pixel; 0: unlike
    const T* const first = planes(i, c0);
    for (int e = static_cast<int>(threadIdx.x); e < n * n; e += static_cast<int>(blockDim.x)) {
      const int r = e / n, y = top + r, x = left + e - r * n, place = r * n_pitch + e - r * n;
      const bool inside = y >= 0 && y < at_rows && x >= 0 && x < at_cols;
      const T* p = first + (static_cast<int64_t>(y) * row_pitch + x) * side_read;
      if (side_read == 1) {
        put<4>(p, area(i), count, place, inside, [](const T* q) { return A(widen(*q)); });
      } else if (side_read == 2 && a.quads[i]) {
        put<4>(p, area(i), count, place, inside, [&](const T* q) {
          const auto upper = *reinterpret_cast<const Pack<T, 2>*>(q),
                     lower = *reinterpret_cast<const Pack<T, 2>*>(q + row_pitch);
          const A v[4] = {widen(upper.v[0]), widen(upper.v[1]), widen(lower.v[0]), widen(lower.v[1])};
          return a.stride == 2 ? (v[0] + v[1] + v[2] + v[3]) * A(0.25) : larger(larger(v[0], v[1]), larger(v[2], v[3]));
        });
      } else if (side_read == 4 && a.stride == 2 && a.quads[i]) {  // the maximum of four averages
        put<2>(p, area(i), count, place, inside, [&](const T* q) {
          A averages[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto* rows = reinterpret_cast<const Pack<T, 4>*>(q + 2 * half * row_pitch);
            const Pack<T, 4> upper = rows[0], lower = rows[row_pitch / 4];
#pragma unroll
            for (int j = 0; j < 2; ++j)
              averages[2 * half + j] = (widen(upper.v[2 * j]) + widen(upper.v[2 * j + 1]) + widen(lower.v[2 * j]) +
                                        widen(lower.v[2 * j + 1])) *
                                       A(0.25);
          }
          return larger(larger(averages[0], averages[1]), larger(averages[2], averages[3]));
        });
      } else {
        put<1>(first, area(i), count, place, inside, [&](const T* plane) { return value(plane, i, at, y, x); });
      }
    }
  }

  // Their weights, [channel and tap][output]; zero past the last output.
  __device__ __forceinline__ void stage_weights(int i, int64_t c0, int count) {
    const int64_t source0 = a.from_begin[i] + c0, target0 = a.to_begin[s] + out0;
    constexpr int ahead = k == 1 ? 2 : 3;
    static_assert(weights_per_thread % ahead == 0);
#pragma unroll 1
    for (int n = 0; n < weights_per_thread; n += ahead) {
      A w[ahead];
      int taps[ahead], outputs[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j) {
        const int e = static_cast<int>(threadIdx.x) + (n + j) * static_cast<int>(blockDim.x);
        const int o = outputs[j] = e / (chunk * k2), tap = taps[j] = e - o * (chunk * k2), c = tap / k2;
        const int64_t at = backward ? ((source0 + c) * a.weight_cols + target0 + o) * k2 + (k2 - 1 - (tap - c * k2))
                                    : ((target0 + o) * a.weight_cols + source0) * k2 + tap;
        w[j] = c < count && o < outs ? widen(a.weight[at]) : A(0);
      }
#pragma unroll
      for (int j = 0; j < ahead; ++j) shared.weights[taps[j]][outputs[j]] = w[j];
    }
  }

  // ------------------------------------------------------------------------------------------ the products
  // Adds what is staged to n_sums pixels in a row, the first tap of the first at `first`.
  template <int n_sums>
  __device__ __forceinline__ void multiply(int count, int first, int n_pitch, A (&sums)[n_sums][outs_per_thread]) {
#pragma unroll unrolled
    for (int c = 0; c < count; ++c) {
#pragma unroll
      for (int dy = 0; dy < k; ++dy) {
        A x[n_sums + k - 1];
        const A* line = &shared.values[c * plane + first + dy * n_pitch];
        if constexpr (n_sums == pixels_per_thread) {  // then `first` and the pitch are whole fours
          const Quad quad = *reinterpret_cast<const Quad*>(line);
#pragma unroll
          for (int p = 0; p < n_sums; ++p) x[p] = quad.v[p];
#pragma unroll
          for (int p = n_sums; p < n_sums + k - 1; ++p) x[p] = line[p];
        } else {
#pragma unroll
          for (int p = 0; p < n_sums + k - 1; ++p) x[p] = line[p];
        }
#pragma unroll
        for (int dx = 0; dx < k; ++dx) {
          const auto* w = reinterpret_cast<const Quad*>(&shared.weights[c * k2 + dy * k + dx][group * outs_per_thread]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Quad weights = w[half];
#pragma unroll
            for (int o = 0; o < 4; ++o)
#pragma unroll
              for (int p = 0; p < n_sums; ++p) sums[p][4 * half + o] += weights.v[o] * x[p + dx];
          }
        }
      }
    }
  }

  // The same of all pixels and up to 16 or 32 channels on tensor cores. A warp's tiles: with 16 channels eight of 8
  // pixels each, else four, times two of 16 channels.
  __device__ __forceinline__ int warp_tile(int i) const {  // the first of its 8 pixels
    const int per_row = a.groups == most_groups ? warp_tiles / 2 : warp_tiles;
    return (static_cast<int>(threadIdx.x) / 32 * per_row + i % per_row) * 8;
  }
  __device__ __forceinline__ void multiply_tiles(int count) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    for (int c = 0; c < count; c += 8) {
#pragma unroll 1
      for (int tap = 0; tap < k2; ++tap) {
        const A* w = &shared.weights[(c + 2 * t) * k2 + tap][g];
        Fragment<T> rows[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {  // the second: the next 16 channels, or again the first
          const A* channels = a.groups == most_groups ? w + 16 * m : w;
          narrow(channels[0], channels[k2 * weight_pitch], rows[m].upper);
          narrow(channels[8], channels[k2 * weight_pitch + 8], rows[m].lower);
        }
        const A* x = &shared.values[(c + 2 * t) * plane + tap / k * pitch + tap % k];
        Pack<T, 2> cols;
#pragma unroll
        for (int i = 0; i < warp_tiles; ++i) {
          const int p = warp_tile(i) + g;
          const A* at = x + p / side * pitch + p % side;
          narrow(at[0], at[plane], cols);
          multiply_add(products[i], rows[i / (warp_tiles / 2)], cols);
        }
      }
    }
  }
  // The results of the tiles to the threads that store them, 16 channels at a time. All threads call.
  __device__ __forceinline__ void collect() {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const int per_row = a.groups == most_groups ? warp_tiles / 2 : warp_tiles;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m > 0 && a.groups < most_groups) break;
#pragma unroll
      for (int i = 0; i < warp_tiles; ++i) {
        if (i / per_row != m) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          shared.values[(g + j / 2 * 8) * result_pitch + warp_tile(i) + 2 * t + j % 2] = products[i][j];
      }
      __syncthreads();
      if (group / 2 == m)
#pragma unroll
        for (int o = 0; o < outs_per_thread; ++o) {
          const Quad quad = *reinterpret_cast<const Quad*>(
              &shared.values[(group % 2 * outs_per_thread + o) * result_pitch + pixel * pixels_per_thread]);
#pragma unroll
          for (int p = 0; p < pixels_per_thread; ++p) sum[p][o] += quad.v[p];
        }
      __syncthreads();
    }
  }

  // A source that is read at the target's pixels.
  __device__ __forceinline__ void add(int i) {
    for (int64_t c = 0; c < a.from.channels[i]; c += chunk) {
      const int count = static_cast<int>(least<int64_t>(chunk, a.from.channels[i] - c));
      recompute(pixel);
      stage_weights(i, c, count);
      if (k == 1)
        stage_pixels(i, c, count);
      else
        stage(i, c, count, s, y0 - halo, x0 - halo, tile_side, pitch);
      __syncthreads();
      recompute(pixel);
      const int first = pixel / quads_per_row * pitch + pixel % quads_per_row * pixels_per_thread;
      if constexpr (tensor_cores)
        multiply_tiles(count);
      else if (busy())
        multiply(count, first, pitch, sum);
      __syncthreads();
    }
  }

  // A coarser source that is convolved at its own size.
  __device__ __forceinline__ void add_apart(int i) {
    const int f = 1 << (i - s), border = backward ? 0 : 1;
    const int n = side / f + 2 * border, staged = n + 2 * halo;
    const int top = y0 / f - border, left = x0 / f - border;
    A sums[2][1][outs_per_thread] = {};  // of pixels `pixel` and `pixel` + 64 of the n x n coarse ones
    for (int64_t c = 0; c < a.from.channels[i]; c += chunk) {
      const int count = static_cast<int>(least<int64_t>(chunk, a.from.channels[i] - c));
      recompute(pixel);
      stage_weights(i, c, count);
      stage(i, c, count, i, top - halo, left - halo, staged, staged);
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = pixel + half * group_threads;
        if (q < n * n && busy()) multiply(count, q / n * staged + q % n, staged, sums[half]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int q = pixel + half * group_threads;
      if (q < n * n)
#pragma unroll
        for (int o = 0; o < outs_per_thread; ++o) shared.coarse[group * outs_per_thread + o][q] = sums[half][0][o];
    }
    __syncthreads();
    if (row() < rows() && busy()) {
      if (backward) {
        add_at_maxima(f, n);
      } else {
#pragma unroll
        for (int p = 0; p < pixels_per_thread; ++p)
          if (col() + p < cols()) add_between(f, n, top, left, p);
      }
    }
    __syncthreads();
  }

  // Pixel p of this thread reads the coarse results bilinearly.
  __device__ __forceinline__ void add_between(int f, int n, int top, int left, int p) {
    const Bilinear<A> v(row(), f, rows() / f), h(col() + p, f, cols() / f);
    const int upper = (v.first - top) * n - left, lower = (v.second - top) * n - left;
#pragma unroll
    for (int o = 0; o < outs_per_thread; ++o) {
      const A* m = shared.coarse[group * outs_per_thread + o];
      sum[p][o] +=
          mix(v, mix(h, m[upper + h.first], m[upper + h.second]), mix(h, m[lower + h.first], m[lower + h.second]));
    }
  }

  // Which of this thread's pixels are the first maximum of their f x f block in one plane of the input, as bits; of
  // NaNs the last, as in torch.
  __device__ __forceinline__ unsigned maxima(const T* plane, int f) const {
    unsigned found = 0;
    if (f == 2 && a.input_quads[s]) {
      if (col() >= cols()) return 0;
      const T* p = plane + static_cast<int64_t>(row() / 2 * 2) * cols() + col();
      const auto upper = *reinterpret_cast<const Pack<T, 4>*>(p),
                 lower = *reinterpret_cast<const Pack<T, 4>*>(p + cols());
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const A v[4] = {widen(upper.v[2 * half]), widen(upper.v[2 * half + 1]), widen(lower.v[2 * half]),
                        widen(lower.v[2 * half + 1])};
        A best = v[0];
        int place = 0;
#pragma unroll
        for (int j = 1; j < 4; ++j)
          if (v[j] > best || v[j] != v[j]) best = v[j], place = j;
        if (place / 2 == row() % 2) found |= 1u << (2 * half + place % 2);
      }
      return found;
    }
    const Plane<T> input{plane, static_cast<int>(a.stored.cols(s)), a.stride == 2};
#pragma unroll 1
    for (int p = 0; p < pixels_per_thread; ++p)
      if (col() + p < cols() && input.is_maximum(row(), col() + p, f)) found |= 1u << p;
    return found;
  }

  // Every pixel of this thread takes the coarse gradient of its block in those channels where it is the maximum. The
  // search is a loop, its results bits: eight copies of it would be most of the kernel.
  __device__ __forceinline__ void add_at_maxima(int f, int n) {
    const int64_t input_area = a.stored.area(s);
    const T* plane = a.inputs[s] + (b * a.to.channels[s] + out0 + group * outs_per_thread) * input_area;
    unsigned found = 0;
#pragma unroll 2
    for (int o = 0; o < outs_per_thread; ++o)
      if (group * outs_per_thread + o < outs) found |= maxima(plane + o * input_area, f) << (pixels_per_thread * o);
#pragma unroll
    for (int p = 0; p < pixels_per_thread; ++p) {
      const int place = (row() / f - y0 / f) * n + (col() + p) / f - x0 / f;
#pragma unroll
      for (int o = 0; o < outs_per_thread; ++o)
        if (found >> (pixels_per_thread * o + p) & 1) sum[p][o] += shared.coarse[group * outs_per_thread + o][place];
    }
  }

  // ------------------------------------------------------------------------------------------- the results
  __device__ __forceinline__ void store() const {
    if (row() >= rows()) return;
    if (backward && a.stride == 2) return spread();
#pragma unroll
    for (int o = 0; o < outs_per_thread; ++o) {
      const int channel = group * outs_per_thread + o;
      if (channel >= outs) continue;
      const int64_t plane = b * a.to.channels[s] + out0 + channel, parameter = a.to_begin[s] + out0 + channel;
      const A bias = a.bias != nullptr ? widen(a.bias[parameter]) : A(0);
      Pack<T, pixels_per_thread> result;
#pragma unroll
      for (int p = 0; p < pixels_per_thread; ++p) {
        const A z = sum[p][o] + bias;
        narrow(a.slope != nullptr ? prelu(z, A(widen(a.slope[parameter]))) : z, result.v[p]);
      }
      T* out = a.targets[s] + plane * a.to.area(s) + static_cast<int64_t>(row()) * cols() + col();
      if (cols() % pixels_per_thread == 0 && col() < cols()) {  // outputs come from the allocator: aligned
        *reinterpret_cast<Pack<T, pixels_per_thread>*>(out) = result;
      } else {
#pragma unroll
        for (int p = 0; p < pixels_per_thread; ++p)
          if (col() + p < cols()) out[p] = result.v[p];
      }
    }
  }

  // Mean and sum of squares about it of what the tile has of every channel, as it was stored. All threads call.
  __device__ __forceinline__ void measure() {
    const int n_rows = least(side, rows() - y0), n_cols = least(side, cols() - x0);
    A* totals = shared.values;  // [sum][warp][channel of the group]; nobody reads the inputs any more
    const auto at = [&](int which, int warp, int o) -> A& {
      return totals[(which * most_groups * 2 + group * 2 + warp) * outs_per_thread + o];
    };
    A part[3][outs_per_thread] = {};
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {  // the sums, then those of the distances from the mean and their squares
#pragma unroll
      for (int o = 0; o < outs_per_thread; ++o) {
        const A mean = pass == 0 ? A(0) : (at(0, 0, o) + at(0, 1, o)) / A(n_rows * n_cols);
#pragma unroll
        for (int p = 0; p < pixels_per_thread; ++p) {
          T stored;
          narrow(sum[p][o], stored);
          const A d = row() < rows() && col() + p < cols() ? widen(stored) - mean : A(0);
          part[pass][o] += d;
          if (pass == 1) part[2][o] += d * d;
        }
        part[pass][o] = warp_sum(part[pass][o]);
        if (pass == 1) part[2][o] = warp_sum(part[2][o]);
        if (pixel % 32 == 0) {
          at(pass, pixel / 32, o) = part[pass][o];
          if (pass == 1) at(2, pixel / 32, o) = part[2][o];
        }
      }
      __syncthreads();
    }
    const int o = pixel, channel = group * outs_per_thread + o;
    if (o >= outs_per_thread || channel >= outs) return;
    const A n = A(n_rows * n_cols), mean = (at(0, 0, o) + at(0, 1, o)) / n;
    const A rest = at(1, 0, o) + at(1, 1, o), square = at(2, 0, o) + at(2, 1, o);
    const int64_t tile = y0 / side * a.moments.across(s) + x0 / side;
    double* out = a.moments.of(s, out0 + channel, b, tile);
    out[0] = double(mean) + double(rest / n), out[1] = double(square - rest * rest / n);
  }

  // The gradient of a 2x2 average; the last row and column also clear what an odd size left out of every average.
  __device__ __forceinline__ void spread() const {
    const int stored_rows = static_cast<int>(a.stored.rows(s)), stored_cols = static_cast<int>(a.stored.cols(s));
#pragma unroll 1
    for (int n = 0; n < pixels_per_thread * outs_per_thread; ++n) {  // one loop: 32 copies would be all of the kernel
      const int y = row(), x = col() + n / outs_per_thread, channel = group * outs_per_thread + n % outs_per_thread;
      if (x >= cols() || channel >= outs) continue;
      A gradient = 0;
#pragma unroll
      for (int p = 0; p < pixels_per_thread; ++p)
#pragma unroll
        for (int o = 0; o < outs_per_thread; ++o)
          if (n == p * outs_per_thread + o) gradient = sum[p][o];  // registers have no run-time index
      T* plane = a.targets[s] + (b * a.to.channels[s] + out0 + channel) * a.stored.area(s);
      const int last_y = y + 1 == rows() ? stored_rows : 2 * y + 2;
      const int last_x = x + 1 == cols() ? stored_cols : 2 * x + 2;
      for (int i = 2 * y; i < last_y; ++i)
        for (int j = 2 * x; j < last_x; ++j)
          narrow(i < 2 * y + 2 && j < 2 * x + 2 ? gradient * A(0.25) : A(0),
                 plane[static_cast<int64_t>(i) * stored_cols + j]);
    }
  }
};

}  // namespace
}  // namespace sodfast::cuda
