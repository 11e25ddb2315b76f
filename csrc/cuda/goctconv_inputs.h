// What a block of the cross-scale convolution brings into shared memory: see goctconv_tile.h for the block.
//
// What keeps such a kernel slow is waiting, so a thread asks for all that it brings of several channels before it
// stores the first of it: it works out where its pixels lie once, then reads them in channel after channel. Where rows
// are whole and aligned, four pixels are one access; the 2x2 max-pool, upsampling by two and the transpose of that have
// such a form too.
#pragma once

#include "cuda/resample_quad.h"
#include "cuda/tile_moments.h"

namespace sodfast::cuda {
namespace {

constexpr int side = 16, outs_per_thread = 8, pixels_per_thread = 4, most_groups = 4;
constexpr int quads_per_row = side / pixels_per_thread, group_threads = side * quads_per_row;  // 64
constexpr int most_outs = outs_per_thread * most_groups;
constexpr int coarse_side = side / 2 + 2, coarse_pixels = coarse_side * coarse_side;
constexpr int warp_tiles = 8;                // of 16 pixels and 8 channels, that a warp multiplies on tensor cores
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
  bool pairs[max_scales];                                // … of the sources, pairs
  int64_t from_begin[max_scales], to_begin[max_scales];  // first channel of a scale among all
  const T *weight, *bias, *slope;
  int64_t weight_cols;  // input channels in all
  int stride, groups;
  BlockRanges blocks;
  TileMoments moments;  // where they are asked for
};

// tensor_cores: whether these multiply, and need whole eights of what is summed up.
template <class T, int k, bool backward, bool tensor_cores>
struct Inputs {
  using A = typename Sum<T>::type;
  using Quad = Pack<A, pixels_per_thread>;
  static constexpr int k2 = k * k, halo = k / 2, chunk = k == 1 ? 16 : 8;
  static constexpr int tile_side = side + 2 * halo, pitch = k == 1 ? side : side + 4;
  static constexpr bool coarse_apart = k != 1 || backward;
  static constexpr int plane = tile_side * pitch + 4;  // k = 1: a warp reads 4 channels at 8 pixels, each its bank
  static constexpr int result_pitch = side * side + 4, result_rows = 16;
  static constexpr int room =
      chunk * plane > result_rows* result_pitch || !tensor_cores ? chunk * plane : result_rows * result_pitch;
  static constexpr int weights_per_thread = chunk * k2 * outs_per_thread / group_threads;

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

  // ------------------------------------------------------------------------------------- into shared memory
  // The planes that are read of `count` channels: tensor cores take eight taps at once, of which the missing are zero.
  static __device__ __forceinline__ int filled(int count) {
    return tensor_cores ? divide_up(divide_up(count * k2, 8) * 8, k2) : count;
  }
  // k = 1: each thread brings its own pixels of every groups-th channel: load(plane) of `ahead` of them before finish()
  // of the first, zeros where `inside` is false.
  template <int ahead, class Load, class Finish>
  __device__ __forceinline__ void bring(const T* from, int64_t plane_area, int count, int p, bool inside,
                                        const Load& load, const Finish& finish) {
    const int64_t step = a.groups * plane_area;
    from += group * plane_area;
#pragma unroll 1
    for (int c = group; c < filled(count); c += ahead * a.groups) {
      using Stored = decltype(load(from));
      Stored stored[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j, from += step) {
        stored[j] = Stored();
        if (inside && c + j * a.groups < count) stored[j] = load(from);
      }
#pragma unroll
      for (int j = 0; j < ahead; ++j) {
        const auto value = finish(stored[j]);
        if (c + j * a.groups < filled(count))
          *reinterpret_cast<std::remove_const_t<decltype(value)>*>(
              &shared.values[(c + j * a.groups) * plane + pixel * pixels_per_thread + p]) = value;
      }
    }
  }
  __device__ __forceinline__ void stage_pixels(int i, int64_t c0, int count) {
    const T* const first = planes(i, c0);
    const int from_rows = static_cast<int>(a.from.rows(i)), from_cols = static_cast<int>(a.from.cols(i));
    const bool whole = a.quads[i] && (backward || a.stride == 1), inside = row() < rows() && col() < cols();
    const auto as_it_is = [](const auto& value) { return value; };
    const auto bring_quads = [&](auto ahead, const auto& quad) {
      bring<decltype(ahead)::value>(
          first, area(i), count, 0, inside, [&](const T* plane) { return quad.load(plane); },
          [&](const auto& stored) { return quad.finish(stored); });
    };
    if (i == s && whole) {
      const int64_t at = static_cast<int64_t>(row()) * cols() + col();
      return bring<4>(
          first, area(i), count, 0, inside, [&](const T* plane) { return words_at<pixels_per_thread>(plane + at); },
          [](const Words<T, pixels_per_thread>& words) {
            Quad quad;
            widen(pack_of(words), quad.v);
            return quad;
          });
    }
    if constexpr (backward) {
      if (i == s - 1 && whole && from_cols == 2 * cols() && from_rows == 2 * rows())
        return bring<1>(
            first, area(i), count, 0, inside,
            [&](const T* plane) { return lowered_quad(plane, rows(), cols(), row(), col()); }, as_it_is);
    } else {
      if (i == s - 1 && whole)
        return bring_quads(std::integral_constant<int, 1>(), HalvedQuad<T>(from_cols, row(), col(), cols()));
      if (i == s + 1 && a.pairs[i] && a.stride == 1)
        return bring_quads(std::integral_constant<int, 2>(), RaisedQuad<T>(from_rows, from_cols, row(), col()));
    }
    struct Corners {
      T v[4];
    };
#pragma unroll 1
    for (int p = 0; p < pixels_per_thread; ++p) {
      const int y = row(), x = col() + p;
      const bool present = y < rows() && x < cols();
      if (i == s && (backward || a.stride == 1)) {
        const int64_t at = static_cast<int64_t>(y) * cols() + x;
        bring<4>(
            first, area(i), count, p, present, [&](const T* plane) { return plane[at]; },
            [](const T& v) { return A(widen(v)); });
      } else if (!backward && i > s && a.stride == 1) {
        const Bilinear<A> v(y, 1 << (i - s), from_rows), h(x, 1 << (i - s), from_cols);
        const int64_t upper = static_cast<int64_t>(v.first) * from_cols, lower = int64_t(v.second) * from_cols;
        bring<2>(
            first, area(i), count, p, present,
            [&](const T* plane) {
              return Corners{
                  {plane[upper + h.first], plane[upper + h.second], plane[lower + h.first], plane[lower + h.second]}};
            },
            [&](const Corners& c) {
              return mix(v, mix(h, A(widen(c.v[0])), A(widen(c.v[1]))), mix(h, A(widen(c.v[2])), A(widen(c.v[3]))));
            });
      } else {
        bring<1>(first, area(i), count, p, present, [&](const T* plane) { return value(plane, i, s, y, x); }, as_it_is);
      }
    }
  }

  // One value of `count` channels, p: where it is in the first of them.
  template <int ahead, class Load, class Finish>
  __device__ __forceinline__ void put(const T* p, int64_t plane_area, int count, int place, bool inside,
                                      const Load& load, const Finish& finish) {
#pragma unroll 1
    for (int c = 0; c < filled(count); c += ahead) {
      using Stored = decltype(load(p));
      Stored stored[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j, p += plane_area) {
        stored[j] = Stored();
        if (inside && c + j < count) stored[j] = load(p);
      }
#pragma unroll
      for (int j = 0; j < ahead; ++j)
        if (c + j < filled(count)) shared.values[(c + j) * plane + place] = finish(stored[j]);
    }
  }
  // Any k: `count` channels, n x n pixels from (top, left) on; zero outside.
  __device__ __forceinline__ void stage(int i, int64_t c0, int count, int at, int top, int left, int n, int n_pitch) {
    const int at_rows = static_cast<int>(a.to.rows(at)), at_cols = static_cast<int>(a.to.cols(at));
    const int row_pitch = static_cast<int>(backward ? a.from.cols(i) : a.stored.cols(i));
    const int side_read = backward ? (i == at ? 1 : 0) : a.stride << (at - i);  // stored pixels per pixel; 0: unlike
    const T* const first = planes(i, c0);
    struct Square2 {
      Words<T, 2> rows[2];
    };
    struct Square4 {
      Words<T, 4> rows[4];
    };
    for (int e = static_cast<int>(threadIdx.x); e < n * n; e += static_cast<int>(blockDim.x)) {
      const int r = e / n, y = top + r, x = left + e - r * n, place = r * n_pitch + e - r * n;
      const bool inside = y >= 0 && y < at_rows && x >= 0 && x < at_cols;
      const T* p = first + (static_cast<int64_t>(y) * row_pitch + x) * side_read;
      if (side_read == 1) {
        put<4>(p, area(i), count, place, inside, [](const T* q) { return *q; }, [](const T& v) { return A(widen(v)); });
      } else if (side_read == 2 && a.quads[i]) {
        put<4>(
            p, area(i), count, place, inside,
            [&](const T* q) { return Square2{{words_at<2>(q), words_at<2>(q + row_pitch)}}; },
            [&](const Square2& square) {
              const Pack<T, 2> upper = pack_of(square.rows[0]), lower = pack_of(square.rows[1]);
              const A v[4] = {widen(upper.v[0]), widen(upper.v[1]), widen(lower.v[0]), widen(lower.v[1])};
              return a.stride == 2 ? (v[0] + v[1] + v[2] + v[3]) * A(0.25)
                                   : larger(larger(v[0], v[1]), larger(v[2], v[3]));
            });
      } else if (side_read == 4 && a.stride == 2 && a.quads[i]) {  // the maximum of four averages
        put<2>(
            p, area(i), count, place, inside,
            [&](const T* q) {
              return Square4{{words_at<4>(q), words_at<4>(q + row_pitch), words_at<4>(q + 2 * row_pitch),
                              words_at<4>(q + 3 * row_pitch)}};
            },
            [](const Square4& square) {
              A averages[4];
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                A upper[4], lower[4];
                widen(pack_of(square.rows[2 * half]), upper), widen(pack_of(square.rows[2 * half + 1]), lower);
#pragma unroll
                for (int j = 0; j < 2; ++j)
                  averages[2 * half + j] =
                      (upper[2 * j] + upper[2 * j + 1] + lower[2 * j] + lower[2 * j + 1]) * A(0.25);
              }
              return larger(larger(averages[0], averages[1]), larger(averages[2], averages[3]));
            });
      } else {
        put<1>(
            first, area(i), count, place, inside, [&](const T* plane) { return value(plane, i, at, y, x); },
            [](const A& v) { return v; });
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
};

}  // namespace
}  // namespace sodfast::cuda
