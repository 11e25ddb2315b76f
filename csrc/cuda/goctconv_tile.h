// A block's work in the cross-scale convolution of goctconv.cu: a tile of 16 x 16 pixels of one scale and sample and
// up to 32 output channels. A thread has 4 pixels of a row times 8 channels in registers: 64 threads share the pixels,
// up to 4 groups of them the channels. Input channels pass through shared memory, a chunk at a time. Tensor cores
// (tensor.h) multiply all but the coarser sources below, and what they leave goes through shared memory to the threads
// that have the pixels.
//
// At k = 1 a coarser source is upsampled on load and then like any other: W * up(x) = up(W * x). At k = 3, where the
// borders differ, and on the way back through a max-pool, which knows its maxima per output channel, it is convolved at
// its own size into shared memory and read from there.
#pragma once

#include "cuda/goctconv_inputs.h"
#include "cuda/tensor.h"

namespace sodfast::cuda {
namespace {

template <class T, int k, bool backward, bool tensor_cores>
struct Tile : Inputs<T, k, backward, tensor_cores> {
  using Base = Inputs<T, k, backward, tensor_cores>;
  using Base::a, Base::b, Base::busy, Base::chunk, Base::col, Base::cols, Base::group, Base::halo, Base::k2, Base::out0,
      Base::outs, Base::pitch, Base::pixel, Base::plane, Base::result_pitch, Base::row, Base::rows, Base::s,
      Base::shared, Base::stage, Base::stage_pixels, Base::stage_weights, Base::tile_side, Base::x0, Base::y0;
  using typename Base::A;
  using typename Base::Quad;
  static constexpr int unrolled = k == 1 ? 2 : 1;

  A sum[pixels_per_thread][outs_per_thread] = {};
  float products[tensor_cores ? warp_tiles : 1][4] = {};  // of this lane, as tensor.h has them

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

  // The same on tensor cores: a warp has 8 tiles of 16 pixels, a row, and 8 channels; with n groups of 8 channels,
  // 8 / n rows. What is summed up are the taps of all staged channels in a row, as the weights lie.
  template <int n>
  __device__ __forceinline__ void multiply_tiles(int count) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const A* const rows = &shared.values[first_row<n>() * pitch + g];
#pragma unroll 1
    for (int tap = 2 * t; tap - 2 * t < count * k2; tap += 8) {
      const A *x = rows + place(tap), *x_next = rows + place(tap + 1);
      const A *w = &shared.weights[tap][g], *w_next = &shared.weights[tap + 1][g];
      const auto pixels = [&](int r) {
        return Fragment<T>{{x[r * pitch], x_next[r * pitch]}, {x[r * pitch + 8], x_next[r * pitch + 8]}};
      };
      const auto channels = [&](int o) { return Pair<T>(w[8 * o], w_next[8 * o]); };
      if constexpr (n < 4) {  // the fewer of the two stay in registers
        Pair<T> held[n];
#pragma unroll
        for (int o = 0; o < n; ++o) held[o] = channels(o);
#pragma unroll
        for (int r = 0; r < warp_tiles / n; ++r) {
          const Fragment<T> row = pixels(r);
#pragma unroll
          for (int o = 0; o < n; ++o)
            if (o == 0 || 8 * o < outs) multiply_add(products[r * n + o], row, held[o]);
        }
      } else {
        const Fragment<T> held[2] = {pixels(0), pixels(1)};
#pragma unroll
        for (int o = 0; o < n; ++o) {
          if (o > 0 && 8 * o >= outs) continue;
          const Pair<T> eight = channels(o);
#pragma unroll
          for (int r = 0; r < 2; ++r) multiply_add(products[r * n + o], held[r], eight);
        }
      }
    }
  }
  // The first row of this warp's.
  template <int n>
  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 * (warp_tiles / n);
  }
  // Where a tap of all channels' lies from the first on.
  static __device__ __forceinline__ int place(int tap) {
    const int c = tap / k2, rest = tap - c * k2;
    return c * plane + rest / k * pitch + rest % k;
  }
  // The results of the tiles to the threads that store them, 16 channels at a time. All threads call.
  template <int n>
  __device__ __forceinline__ void collect_tiles() {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < divide_up(n, 2); ++half) {
#pragma unroll
      for (int r = 0; r < warp_tiles / n; ++r)
#pragma unroll
        for (int o = 2 * half; o < least(2 * half + 2, n); ++o)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            shared.values[(o % 2 * 8 + 2 * t + j % 2) * result_pitch + (first_row<n>() + r) * side + g + j / 2 * 8] =
                products[r * n + o][j];
      __syncthreads();
      if (group / 2 == half)
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
  __device__ __forceinline__ void multiply_tiles(int count) {
    a.groups == 1 ? multiply_tiles<1>(count) : a.groups == 2 ? multiply_tiles<2>(count) : multiply_tiles<4>(count);
  }
  __device__ __forceinline__ void collect() {
    a.groups == 1 ? collect_tiles<1>() : a.groups == 2 ? collect_tiles<2>() : collect_tiles<4>();
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
