// Depthwise 3x3 of every scale in one launch (CSNet's ILBlock), and its gradients; the gradient to the input is the
// same convolution with the taps turned.
//
//   y[c][p] = Σ_t w[c][t] · x[c][p + dilation · t],     gw[c][t] = Σ_{b,p} g[c][p] · x[c][p + dilation · t]
//
// A thread has 4 x 4 pixels of a plane: it reads 6 rows of 6 values (4 of them in one access where the rows are
// aligned) and writes 4 of 4; neighbours' values come from L1. 18 FLOPs per output, 8 bytes of device memory in
// float32 (4 in half precision): memory bounds it. The aim is the copy bandwidth. The gradient to the weight reads x
// and g once and aims at the same: a block sums one channel's slice of its strips, every thread reads all of a strip
// (4 rows of g, 6 of x) before its 144 multiply-adds, a second launch adds the slices.
#include "cuda/depthwise_rows.h"
#include "cuda/reduce.h"
#include "cuda/slices.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = 256, strip = 4;

template <class T>
struct Arguments {
  Pyramid maps;
  const T* xs[max_scales];
  T* ys[max_scales];  // or, in the gradient to the weight, the gradients
  const T* gys[max_scales];
  bool aligned[max_scales];  // rows of whole, aligned packs
  const T *weight, *bias, *slope;
  int64_t dilation;
  bool flip;
  BlockRanges blocks;
};

// The tap t of pixel (y, x) for any dilation; zero outside.
template <class T>
__device__ __forceinline__ typename Sum<T>::type tap(const T* plane, int y, int x, int t, int64_t dilation, int rows,
                                                     int cols) {
  const int64_t yy = y + (t / 3 - 1) * dilation, xx = x + (t % 3 - 1) * dilation;
  if (yy < 0 || yy >= rows || xx < 0 || xx >= cols) return 0;
  return widen(plane[yy * cols + xx]);
}

template <class T, bool adjacent>  // adjacent: the dilation is 1
__global__ void __launch_bounds__(threads) convolve(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  int64_t rest, part;
  const int s = a.blocks.find(blockIdx.x, a.maps.scales, rest);
  const int rows = static_cast<int>(a.maps.rows(s)), cols = static_cast<int>(a.maps.cols(s));
  rest = divide(rest * threads + threadIdx.x, divide_up(cols, lane_pixels), part);
  const int x = static_cast<int>(part) * lane_pixels;
  const int64_t plane = divide(rest, divide_up(rows, strip), part);
  const int y = static_cast<int>(part) * strip;
  if (plane >= a.maps.batch * a.maps.channels[s]) return;
  int64_t channel;
  divide(plane, a.maps.channels[s], channel);
  channel += a.maps.begin(s);
  const T* in = a.xs[s] + plane * a.maps.area(s);
  A w[9];
#pragma unroll
  for (int t = 0; t < 9; ++t) w[t] = widen(a.weight[channel * 9 + (a.flip ? 8 - t : t)]);
  A sum[strip][lane_pixels] = {};
  if (adjacent) {
#pragma unroll
    for (int r = -1; r <= strip; ++r) {
      A v[6];
      read_row(in, y + r, x, rows, cols, a.aligned[s], v);
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {  // row r is tap dy of the output row r + 1 - dy
        const int o = r + 1 - dy;
        if (o < 0 || o >= strip) continue;
#pragma unroll
        for (int i = 0; i < lane_pixels; ++i)
#pragma unroll
          for (int dx = 0; dx < 3; ++dx) sum[o][i] += w[dy * 3 + dx] * v[i + dx];
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < strip; ++r)
#pragma unroll
      for (int i = 0; i < lane_pixels; ++i)
        if (y + r < rows && x + i < cols)
#pragma unroll
          for (int t = 0; t < 9; ++t) sum[r][i] += w[t] * tap(in, y + r, x + i, t, a.dilation, rows, cols);
  }
  const A bias = a.bias != nullptr ? widen(a.bias[channel]) : A(0);
  const A slope = a.slope != nullptr ? widen(a.slope[channel]) : A(1);
#pragma unroll
  for (int r = 0; r < strip; ++r) {
    if (y + r >= rows) continue;
    Pack<T, lane_pixels> result;
#pragma unroll
    for (int i = 0; i < lane_pixels; ++i)
      narrow(a.slope != nullptr ? prelu(sum[r][i] + bias, slope) : sum[r][i] + bias, result.v[i]);
    T* out = a.ys[s] + plane * a.maps.area(s) + static_cast<int64_t>(y + r) * cols + x;
    if (a.aligned[s]) {
      *reinterpret_cast<Pack<T, lane_pixels>*>(out) = result;
    } else {
#pragma unroll
      for (int i = 0; i < lane_pixels; ++i)
        if (x + i < cols) out[i] = result.v[i];
    }
  }
}

// Adds what a strip (4 x 4 pixels from (y, x) on) of g and its neighbourhood in x give the nine taps. A pixel that does
// not exist must not meet its neighbours: zero times NaN is NaN.
template <bool aligned, class T, class A>
__device__ __forceinline__ void add_strip(const T* g, const T* in, int y, int x, int rows, int cols, A (&sum)[9]) {
  A gradient[strip][6], v[strip + 2][6];  // all reads before the first product, so that their latencies overlap
#pragma unroll
  for (int o = 0; o < strip; ++o) read_row(g, y + o, x, rows, cols, aligned, gradient[o]);
#pragma unroll
  for (int r = 0; r < strip + 2; ++r) read_row(in, y + r - 1, x, rows, cols, aligned, v[r]);
#pragma unroll
  for (int o = 0; o < strip; ++o) {
    if (y + o >= rows) break;
#pragma unroll
    for (int p = 0; p < lane_pixels; ++p)
      if (aligned || x + p < cols)
#pragma unroll
        for (int t = 0; t < 9; ++t) sum[t] += gradient[o][1 + p] * v[o + t / 3][p + t % 3];
  }
}

// Block: one channel, one slice of its strips. blocks: the channels of the scales.
template <class T, bool adjacent>
__global__ void __launch_bounds__(threads, 2)  // 3 would spill registers
    correlate(const __grid_constant__ Arguments<T> a, typename Sum<T>::type* workspace, int64_t slices) {
  using A = typename Sum<T>::type;
  __shared__ A shared[threads / 32 * 9];
  int64_t slice, channel;
  const int64_t index = divide(blockIdx.x, slices, slice);
  const int s = a.blocks.find(index, a.maps.scales, channel);
  const int rows = static_cast<int>(a.maps.rows(s)), cols = static_cast<int>(a.maps.cols(s));
  const int64_t quads = divide_up(cols, lane_pixels), strips = divide_up(rows, strip);
  const int64_t items = a.maps.batch * strips * quads, end = (slice + 1) * items / slices;
  const bool aligned = a.aligned[s];
  A sum[9] = {};
  for (int64_t i = slice * items / slices + threadIdx.x; i < end; i += threads) {
    int64_t quad, row;
    const int64_t b = divide(divide(i, quads, quad), strips, row);
    const int y = static_cast<int>(row) * strip, x = static_cast<int>(quad) * lane_pixels;
    const int64_t plane = (b * a.maps.channels[s] + channel) * a.maps.area(s);
    const T *g = a.gys[s] + plane, *in = a.xs[s] + plane;
    if (adjacent && aligned) {
      add_strip<true>(g, in, y, x, rows, cols, sum);
    } else if (adjacent) {
      add_strip<false>(g, in, y, x, rows, cols, sum);
    } else {
#pragma unroll 1
      for (int pixel = 0; pixel < strip * lane_pixels; ++pixel) {
        const int yy = y + pixel / lane_pixels, xx = x + pixel % lane_pixels;
        if (yy >= rows || xx >= cols) continue;
        const A gradient = widen(g[static_cast<int64_t>(yy) * cols + xx]);
#pragma unroll
        for (int t = 0; t < 9; ++t) sum[t] += gradient * tap(in, yy, xx, t, a.dilation, rows, cols);
      }
    }
  }
  block_sums(sum, shared, threads / 32);
  A* out = workspace + (slice * a.blocks.first[a.maps.scales] + index) * 9;
#pragma unroll
  for (int t = 0; t < 9; ++t)
    if (threadIdx.x == 0) out[t] = sum[t];
}

template <class T>
Arguments<T> arguments_for(const DepthwiseShape& shape, Pointers xs, Pointers others) {
  Arguments<T> a{};
  a.maps = shape.maps, a.dilation = least<int64_t>(shape.dilation, 1 << 30);
  for (int s = 0; s < a.maps.scales; ++s) {
    a.xs[s] = static_cast<const T*>(xs[s]);
    const uintptr_t both = reinterpret_cast<uintptr_t>(xs[s]) | reinterpret_cast<uintptr_t>(others[s]);
    a.aligned[s] = a.maps.cols(s) % lane_pixels == 0 && both % (lane_pixels * sizeof(T)) == 0;
  }
  return a;
}

// The strips of a plane of scale s and of the same plane of every other sample.
int64_t items_of(const Pyramid& maps, int s) {
  return maps.batch * divide_up<int64_t>(maps.rows(s), strip) * divide_up<int64_t>(maps.cols(s), lane_pixels);
}

int64_t slices_for(const Pyramid& maps) {
  int64_t most = 0;
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t items = items_of(maps, s);
    if (maps.channels[s] > 0 && items > most) most = items;
  }
  return slice_count(maps.total(), divide_up<int64_t>(most, threads), maps.total() * 9);
}

}  // namespace

cudaError_t depthwise(Type type, const DepthwiseShape& shape, Pointers xs, const void* weight, const void* bias,
                      const void* slope, bool flip, MutablePointers ys, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_for<T>(shape, xs, const_cast<Pointers>(ys));
    a.weight = static_cast<const T*>(weight), a.bias = static_cast<const T*>(bias);
    a.slope = static_cast<const T*>(slope), a.flip = flip;
    for (int s = 0; s < a.maps.scales; ++s) {
      a.ys[s] = static_cast<T*>(ys[s]);
      a.blocks.first[s + 1] = a.blocks.first[s] + divide_up<int64_t>(items_of(a.maps, s) * a.maps.channels[s], threads);
    }
    return launch(a.dilation == 1 ? convolve<T, true> : convolve<T, false>, a.blocks.first[a.maps.scales], threads,
                  stream, a);
  });
}

int64_t depthwise_grad_weight_workspace(Type type, const DepthwiseShape& shape) {
  return slices_for(shape.maps) * shape.maps.total() * 9 * (type == Type::f64 ? 8 : 4);
}

cudaError_t depthwise_grad_weight(Type type, const DepthwiseShape& shape, Pointers gys, Pointers xs, void* gweight,
                                  void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Sum<T>::type;
    Arguments<T> a = arguments_for<T>(shape, xs, gys);
    for (int s = 0; s < a.maps.scales; ++s)
      a.gys[s] = static_cast<const T*>(gys[s]), a.blocks.first[s + 1] = a.maps.begin(s + 1);
    A* sums = static_cast<A*>(workspace);
    const int64_t slices = slices_for(a.maps), channels = a.maps.total();
    const cudaError_t error = launch(a.dilation == 1 ? correlate<T, true> : correlate<T, false>, channels * slices,
                                     threads, stream, a, sums, slices);
    const Segments<T> out{{static_cast<T*>(gweight)}, {0, channels * 9}, 1};
    return error != cudaSuccess ? error : add_all_slices(out, sums, slices, stream);
  });
}

}  // namespace sodfast::cuda
