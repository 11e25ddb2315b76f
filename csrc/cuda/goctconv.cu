// Cross-scale convolution (gOctConv, CSNet section 3.1) and the gradient to its input.
//
//   y_j = Σ_{i<=j} W_ji * pool(x_i)  +  Σ_{i>j} up(W_ji * x_i)        pool: max 2^(j-i), up: bilinear 2^(i-j)
//
// One launch computes all output scales. A block has a tile of 16 x 16 pixels of one scale and sample and up to 32
// output channels; a thread has 4 pixels of a row times 8 channels in registers. Input channels come 8 at a time:
// finer sources are pooled on their way into shared memory, coarser ones are convolved at their own size into shared
// memory and read from there bilinearly. Nothing but the result is written to memory.
//
// The gradient to the input is the same machine with the weights transposed and turned: the transpose of `up` takes
// the place of pool, the way back through max-pool that of `up`, and stride 2 spreads its result over 2x2 pixels.
//
// In training the tile's moments follow its results, so that the norm behind it needs no pass of its own to find them.
//
// Per output pixel and channel 2·in·k² FLOPs; bytes: every input and output once (other channels' blocks of a tile
// run next to each other and find it in L2). At k = 1 and CSNet's 10 to 80 channels that is 5 to 20 FLOPs per byte in
// float32: memory bounds it up to some 60 channels, float32 arithmetic beyond. The aim is the bandwidth.
#include "cuda/resample.h"
#include "cuda/tile_moments.h"

namespace sodfast::cuda {
namespace {

constexpr int side = 16, chunk = 8, outs_per_thread = 8, pixels_per_thread = 4, most_groups = 4;
constexpr int group_threads = side * side / pixels_per_thread;  // 64: they share the pixels, groups the channels
constexpr int most_outs = outs_per_thread * most_groups;
constexpr int coarse_side = side / 2 + 2, coarse_pixels = coarse_side * coarse_side;
constexpr int weight_pitch = most_outs + 4;  // whole 16 bytes, and not all rows in one bank

// `from` and `to` are the sides of this direction at the sizes of the convolution; stored: the inputs' sizes in
// memory, twice that at stride 2.
template <class T>
struct Arguments {
  Pyramid from, to, stored;
  const T* sources[max_scales];
  const T* inputs[max_scales];  // backward: where the maxima are
  T* targets[max_scales];
  const T *weight, *bias, *slope;
  int64_t weight_cols;  // input channels in all
  int stride, groups;
  BlockRanges blocks;
  TileMoments moments;  // where they are asked for
};

template <class T, int k, bool backward>
struct Tile {
  using A = typename Sum<T>::type;
  static constexpr int k2 = k * k, halo = k / 2;
  static constexpr int tile_side = side + 2 * halo, pitch = k == 1 ? side : side + 4;

  struct Shared {
    alignas(16) A values[chunk][tile_side * pitch];
    alignas(16) A weights[chunk * k2][weight_pitch];
    A coarse[most_outs][coarse_pixels + 1];
  };

  const Arguments<T>& a;
  Shared& shared;
  int s;             // target scale
  int64_t b;         // sample
  int y0, x0, out0;  // first row, column and channel of the tile
  int outs;          // channels of it, at most 32
  int group, pixel;  // of this thread
  A sum[pixels_per_thread][outs_per_thread] = {};

  __device__ __forceinline__ int row() const { return y0 + pixel / (side / pixels_per_thread); }
  __device__ __forceinline__ int col() const { return x0 + pixel % (side / pixels_per_thread) * pixels_per_thread; }

  // Source scale i, channel c, as target scale s sees it at (y, x) of scale at = max(i, s).
  __device__ __forceinline__ A value(int i, int64_t c, int at, int y, int x) const {
    const int64_t plane = b * a.from.channels[i] + c;
    const int f = 1 << (at - i);
    if (backward) {
      const int rows = static_cast<int>(a.from.rows(i)), cols = static_cast<int>(a.from.cols(i));
      return lowered(a.sources[i] + plane * a.from.area(i), rows, cols, y, x, f);
    }
    const Plane<T> source{a.sources[i] + plane * a.stored.area(i), static_cast<int>(a.stored.cols(i)), a.stride == 2};
    return f == 1 ? source.at(y, x) : source.pooled(y, x, f);
  }

  // Puts `count` channels of source i from c0 on into shared memory, n x n pixels from (top, left) on; zero outside.
  __device__ __forceinline__ void stage(int i, int64_t c0, int count, int at, int top, int left, int n, int n_pitch) {
    const int rows = static_cast<int>(a.to.rows(at)), cols = static_cast<int>(a.to.cols(at));
    for (int e = static_cast<int>(threadIdx.x); e < count * n * n; e += static_cast<int>(blockDim.x)) {
      const int c = e / (n * n), place = e - c * n * n, r = place / n, q = place - r * n;
      const int y = top + r, x = left + q;
      const bool inside = y >= 0 && y < rows && x >= 0 && x < cols;
      shared.values[c][r * n_pitch + q] = inside ? value(i, c0 + c, at, y, x) : A(0);
    }
    // Their weights, [channel and tap][output]; zero past the last output.
    const int64_t source0 = a.from.begin(i) + c0, target0 = a.to.begin(s) + out0;
    const int width = a.groups * outs_per_thread;
    for (int e = static_cast<int>(threadIdx.x); e < count * k2 * width; e += static_cast<int>(blockDim.x)) {
      const int o = e / (count * k2), rest = e - o * count * k2, c = rest / k2, t = rest - c * k2;
      const int64_t source = source0 + c, target = target0 + o;
      const int64_t at_weight =
          backward ? (source * a.weight_cols + target) * k2 + (k2 - 1 - t) : (target * a.weight_cols + source) * k2 + t;
      shared.weights[rest][o] = o < outs ? widen(a.weight[at_weight]) : A(0);
    }
  }

  // Adds what is staged to n_sums pixels in a row, the first tap of the first at `first`.
  template <int n_sums>
  __device__ __forceinline__ void multiply(int count, int first, int n_pitch, A (&sums)[n_sums][outs_per_thread]) {
    for (int c = 0; c < count; ++c) {
#pragma unroll
      for (int dy = 0; dy < k; ++dy) {
        A x[n_sums + k - 1];
#pragma unroll
        for (int p = 0; p < n_sums + k - 1; ++p) x[p] = shared.values[c][first + dy * n_pitch + p];
#pragma unroll
        for (int dx = 0; dx < k; ++dx) {
          const auto* w =
              reinterpret_cast<const Pack<A, 4>*>(&shared.weights[c * k2 + dy * k + dx][group * outs_per_thread]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Pack<A, 4> weights = w[half];
#pragma unroll
            for (int o = 0; o < 4; ++o)
#pragma unroll
              for (int p = 0; p < n_sums; ++p) sums[p][4 * half + o] += weights.v[o] * x[p + dx];
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_finer(int i) {
    const int first =
        pixel / (side / pixels_per_thread) * pitch + pixel % (side / pixels_per_thread) * pixels_per_thread;
    for (int64_t c = 0; c < a.from.channels[i]; c += chunk) {
      const int count = static_cast<int>(least<int64_t>(chunk, a.from.channels[i] - c));
      stage(i, c, count, s, y0 - halo, x0 - halo, tile_side, pitch);
      __syncthreads();
      if (group * outs_per_thread < outs) multiply(count, first, pitch, sum);
      __syncthreads();
    }
  }

  __device__ __forceinline__ void add_coarser(int i) {
    const int f = 1 << (i - s), border = backward ? 0 : 1;
    const int n = side / f + 2 * border, staged = n + 2 * halo;
    const int top = y0 / f - border, left = x0 / f - border;
    A sums[2][1][outs_per_thread] = {};  // of pixels `pixel` and `pixel` + 64 of the n x n coarse ones
    for (int64_t c = 0; c < a.from.channels[i]; c += chunk) {
      const int count = static_cast<int>(least<int64_t>(chunk, a.from.channels[i] - c));
      stage(i, c, count, i, top - halo, left - halo, staged, staged);
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = pixel + half * group_threads;
        if (q < n * n && group * outs_per_thread < outs) multiply(count, q / n * staged + q % n, staged, sums[half]);
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
    const int rows = static_cast<int>(a.to.rows(s)), cols = static_cast<int>(a.to.cols(s));
    if (row() < rows && group * outs_per_thread < outs) {
      if (backward) {
        add_at_maxima(f, n);
      } else {
#pragma unroll
        for (int p = 0; p < pixels_per_thread; ++p)
          if (col() + p < cols) add_between(f, n, top, left, p);
      }
    }
    __syncthreads();
  }

  // Pixel p of this thread reads the coarse results bilinearly.
  __device__ __forceinline__ void add_between(int f, int n, int top, int left, int p) {
    const Bilinear<A> v(row(), f, static_cast<int>(a.to.rows(s)) / f),
        h(col() + p, f, static_cast<int>(a.to.cols(s)) / f);
    const int upper = (v.first - top) * n - left, lower = (v.second - top) * n - left;
#pragma unroll
    for (int o = 0; o < outs_per_thread; ++o) {
      const A* m = shared.coarse[group * outs_per_thread + o];
      const A above = (1 - h.part) * m[upper + h.first] + h.part * m[upper + h.second];
      const A below = (1 - h.part) * m[lower + h.first] + h.part * m[lower + h.second];
      sum[p][o] += (1 - v.part) * above + v.part * below;
    }
  }

  // Every pixel of this thread takes the coarse gradient of its block in those channels where it is the maximum. The
  // search is one loop, its results bits: 32 copies of it would be all of the kernel.
  __device__ __forceinline__ void add_at_maxima(int f, int n) {
    const int cols = static_cast<int>(a.to.cols(s));
    unsigned maxima = 0;
#pragma unroll 1
    for (int i = 0; i < pixels_per_thread * outs_per_thread; ++i) {
      const int p = i / outs_per_thread, channel = group * outs_per_thread + i % outs_per_thread;
      if (col() + p >= cols || channel >= outs) continue;
      const int64_t plane = b * a.to.channels[s] + out0 + channel;
      const Plane<T> input{a.inputs[s] + plane * a.stored.area(s), static_cast<int>(a.stored.cols(s)), a.stride == 2};
      maxima |= static_cast<unsigned>(input.is_maximum(row(), col() + p, f)) << i;
    }
#pragma unroll
    for (int p = 0; p < pixels_per_thread; ++p) {
      const int place = (row() / f - y0 / f) * n + (col() + p) / f - x0 / f;
#pragma unroll
      for (int o = 0; o < outs_per_thread; ++o)
        if (maxima >> (p * outs_per_thread + o) & 1) sum[p][o] += shared.coarse[group * outs_per_thread + o][place];
    }
  }

  __device__ __forceinline__ void store() const {
    const int rows = static_cast<int>(a.to.rows(s)), cols = static_cast<int>(a.to.cols(s));
    if (row() >= rows) return;
    if (backward && a.stride == 2) return spread();
#pragma unroll
    for (int o = 0; o < outs_per_thread; ++o) {
      const int channel = group * outs_per_thread + o;
      if (channel >= outs) continue;
      const int64_t plane = b * a.to.channels[s] + out0 + channel, parameter = a.to.begin(s) + out0 + channel;
      const A bias = a.bias != nullptr ? widen(a.bias[parameter]) : A(0);
      Pack<T, pixels_per_thread> result;
#pragma unroll
      for (int p = 0; p < pixels_per_thread; ++p) {
        const A z = sum[p][o] + bias;
        narrow(a.slope != nullptr ? prelu(z, A(widen(a.slope[parameter]))) : z, result.v[p]);
      }
      T* out = a.targets[s] + plane * a.to.area(s) + static_cast<int64_t>(row()) * cols + col();
      if (cols % pixels_per_thread == 0 && col() < cols) {  // outputs come from the allocator: aligned
        *reinterpret_cast<Pack<T, pixels_per_thread>*>(out) = result;
      } else {
#pragma unroll
        for (int p = 0; p < pixels_per_thread; ++p)
          if (col() + p < cols) out[p] = result.v[p];
      }
    }
  }

  // Mean and sum of squares about it of what the tile has of every channel, as it was stored. All threads call.
  __device__ __forceinline__ void measure() {
    const int rows = static_cast<int>(a.to.rows(s)), cols = static_cast<int>(a.to.cols(s));
    const int n_rows = least(side, rows - y0), n_cols = least(side, cols - x0);
    A* totals = &shared.coarse[0][0];  // [sum][warp][channel of the group]; nobody reads the coarse results any more
    const auto at = [&](int which, int warp, int o) -> A& {
      return totals[(which * most_groups * 2 + group * 2 + warp) * outs_per_thread + o];
    };
    A part[3][outs_per_thread] = {};
#pragma unroll
    for (int pass = 0; pass < 2;
         ++pass) {  // first the sums, then those of the distances from the mean and their squares
#pragma unroll
      for (int o = 0; o < outs_per_thread; ++o) {
        const A mean = pass == 0 ? A(0) : (at(0, 0, o) + at(0, 1, o)) / A(n_rows * n_cols);
#pragma unroll
        for (int p = 0; p < pixels_per_thread; ++p) {
          T stored;
          narrow(sum[p][o], stored);
          const A d = row() < rows && col() + p < cols ? widen(stored) - mean : A(0);
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
      if (x >= static_cast<int>(a.to.cols(s)) || channel >= outs) continue;
      A gradient = 0;
#pragma unroll
      for (int p = 0; p < pixels_per_thread; ++p)
#pragma unroll
        for (int o = 0; o < outs_per_thread; ++o)
          if (n == p * outs_per_thread + o) gradient = sum[p][o];  // registers have no run-time index
      T* plane = a.targets[s] + (b * a.to.channels[s] + out0 + channel) * a.stored.area(s);
      const int last_y = y + 1 == static_cast<int>(a.to.rows(s)) ? stored_rows : 2 * y + 2;
      const int last_x = x + 1 == static_cast<int>(a.to.cols(s)) ? stored_cols : 2 * x + 2;
      for (int i = 2 * y; i < last_y; ++i)
        for (int j = 2 * x; j < last_x; ++j)
          narrow(i < 2 * y + 2 && j < 2 * x + 2 ? gradient * A(0.25) : A(0),
                 plane[static_cast<int64_t>(i) * stored_cols + j]);
    }
  }
};

template <class T, int k, bool backward, bool measured = false>
__global__ void __launch_bounds__(group_threads* most_groups) convolve(const __grid_constant__ Arguments<T> a) {
  using Work = Tile<T, k, backward>;
  __shared__ typename Work::Shared shared;
  int64_t rest, part;
  const int s = a.blocks.find(blockIdx.x, a.to.scales, rest);
  const int outs_per_block = a.groups * outs_per_thread;
  rest = divide(rest, divide_up<int64_t>(a.to.channels[s], outs_per_block), part);
  const int out0 = static_cast<int>(part) * outs_per_block;
  rest = divide(rest, divide_up<int64_t>(a.to.cols(s), side), part);
  const int x0 = static_cast<int>(part) * side;
  rest = divide(rest, divide_up<int64_t>(a.to.rows(s), side), part);
  const int y0 = static_cast<int>(part) * side;
  Work work{a,
            shared,
            s,
            rest,
            y0,
            x0,
            out0,
            static_cast<int>(least<int64_t>(outs_per_block, a.to.channels[s] - out0)),
            static_cast<int>(threadIdx.x) / group_threads,
            static_cast<int>(threadIdx.x) % group_threads};
  for (int i = a.from.scales - 1; i > s; --i) work.add_coarser(i);
  for (int i = 0; i <= least(s, a.from.scales - 1); ++i) work.add_finer(i);
  work.store();
  if (measured) work.measure();
}

template <class T>
cudaError_t run(Arguments<T>& a, int64_t kernel, bool backward, cudaStream_t stream, bool measured = false) {
  int64_t most = 1;
  for (int s = 0; s < a.to.scales; ++s) most = a.to.channels[s] > most ? a.to.channels[s] : most;
  a.groups = static_cast<int>(least<int64_t>(most_groups, divide_up<int64_t>(most, outs_per_thread)));
  for (int s = 0; s < a.to.scales; ++s)
    a.blocks.first[s + 1] = a.blocks.first[s] + a.to.batch * divide_up<int64_t>(a.to.rows(s), side) *
                                                    divide_up<int64_t>(a.to.cols(s), side) *
                                                    divide_up<int64_t>(a.to.channels[s], a.groups * outs_per_thread);
  const int64_t blocks = a.blocks.first[a.to.scales];
  const int threads = group_threads * a.groups;
  if (measured)
    return launch(kernel == 1 ? convolve<T, 1, false, true> : convolve<T, 3, false, true>, blocks, threads, stream, a);
  if (kernel == 1) return launch(backward ? convolve<T, 1, true> : convolve<T, 1, false>, blocks, threads, stream, a);
  return launch(backward ? convolve<T, 3, true> : convolve<T, 3, false>, blocks, threads, stream, a);
}

// The inputs' sizes after the stride.
Pyramid at_convolution(const GOctConvShape& shape) {
  Pyramid p = shape.in;
  p.height = shape.out.height, p.width = shape.out.width;
  return p;
}

template <class T>
void fill(Pointers from, const T* (&to)[max_scales], int n) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<const T*>(from[i]);
}

template <class T>
Arguments<T> arguments_for(const GOctConvShape& shape, Pointers xs, const void* weight, MutablePointers ys) {
  Arguments<T> a{};
  a.from = at_convolution(shape), a.to = shape.out, a.stored = shape.in;
  fill(xs, a.sources, a.from.scales);
  for (int s = 0; s < a.to.scales; ++s) a.targets[s] = static_cast<T*>(ys[s]);
  a.weight = static_cast<const T*>(weight), a.weight_cols = shape.in.total();
  a.stride = static_cast<int>(shape.stride);
  return a;
}

}  // namespace

cudaError_t goctconv(Type type, const GOctConvShape& shape, Pointers xs, const void* weight, const void* bias,
                     const void* slope, MutablePointers ys, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_for<T>(shape, xs, weight, ys);
    a.bias = static_cast<const T*>(bias), a.slope = static_cast<const T*>(slope);
    return run(a, shape.kernel, false, stream);
  });
}

int64_t goctconv_measured_workspace(const GOctConvShape& shape) {
  return tile_moments(shape.out, side, side).first[shape.out.scales] * 2 * static_cast<int64_t>(sizeof(double));
}

cudaError_t goctconv_measured(Type type, const GOctConvShape& shape, Pointers xs, const void* weight,
                              MutablePointers ys, double* moments, void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_for<T>(shape, xs, weight, ys);
    a.moments = tile_moments(shape.out, side, side);
    a.moments.tiles = static_cast<double*>(workspace), a.moments.planes = moments;
    const cudaError_t error = run(a, shape.kernel, false, stream, true);
    const int64_t planes = shape.out.batch * shape.out.total();
    return error != cudaSuccess
               ? error
               : launch(combine_tiles, divide_up<int64_t>(planes, warps), sodfast::cuda::threads, stream, a.moments);
  });
}

cudaError_t goctconv_grad_input(Type type, const GOctConvShape& shape, Pointers gys, Pointers xs, const void* weight,
                                MutablePointers gxs, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a{};
    a.from = shape.out, a.to = at_convolution(shape), a.stored = shape.in;
    fill(gys, a.sources, a.from.scales);
    fill(xs, a.inputs, a.to.scales);
    for (int s = 0; s < a.to.scales; ++s) a.targets[s] = static_cast<T*>(gxs[s]);
    a.weight = static_cast<const T*>(weight), a.weight_cols = shape.in.total();
    a.stride = static_cast<int>(shape.stride);
    return run(a, shape.kernel, true, stream);
  });
}

}  // namespace sodfast::cuda
