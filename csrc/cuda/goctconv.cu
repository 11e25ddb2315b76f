// Cross-scale convolution (gOctConv, CSNet section 3.1) and the gradient to its input.
//
//   y_j = Σ_{i<=j} W_ji * pool(x_i)  +  Σ_{i>j} up(W_ji * x_i)        pool: max 2^(j-i), up: bilinear 2^(i-j)
//
// One launch computes all output scales; a block does what goctconv_tile.h says. Nothing but the result is written to
// memory.
//
// The gradient to the input is the same machine with the weights transposed and turned: the transpose of `up` takes
// the place of pool, the way back through max-pool that of `up`, and stride 2 spreads its result over 2x2 pixels.
//
// In training the tile's moments follow its results, so that the norm behind it needs no pass of its own to find them.
//
// Per output pixel and channel 2·in·k² FLOPs; bytes: every input and output once (other channels' blocks of a tile
// run next to each other and find it in L2). At k = 1 and CSNet's 10 to 80 channels that is 5 to 20 FLOPs per byte in
// float32: memory bounds it up to some 60 channels, arithmetic beyond. The aim is the bandwidth.
#include "cuda/goctconv_tile.h"

namespace sodfast::cuda {
namespace {

template <class T, bool tensor_cores, int k, bool backward, bool measured = false>
__global__ void __launch_bounds__(group_threads* most_groups, 2) convolve(const __grid_constant__ Arguments<T> a) {
  using Work = Tile<T, k, backward, tensor_cores>;
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
  Work work{{a, shared, s, rest, y0, x0, out0,
             static_cast<int>(least<int64_t>(outs_per_block, a.to.channels[s] - out0)),
             static_cast<int>(threadIdx.x) / group_threads, static_cast<int>(threadIdx.x) % group_threads}};
  for (int i = 0; i < (Work::coarse_apart ? least(s + 1, a.from.scales) : a.from.scales); ++i) work.add(i);
  if constexpr (tensor_cores) work.collect();
  if (Work::coarse_apart)
    for (int i = a.from.scales - 1; i > s; --i) work.add_apart(i);
  work.store();
  if (measured) work.measure();
}

template <class T, bool tensor_cores>
cudaError_t run(Arguments<T>& a, int64_t kernel, bool backward, cudaStream_t stream, bool measured) {
  const auto whole = [](const T* maps, int64_t cols, int pixels) {
    return cols % pixels == 0 && reinterpret_cast<uintptr_t>(maps) % (pixels * sizeof(T)) == 0;
  };
  const auto quads = [&](const T* maps, int64_t cols) { return whole(maps, cols, pixels_per_thread); };
  for (int i = 0; i < a.from.scales; ++i) {
    a.from_begin[i] = a.from.begin(i);
    a.quads[i] = quads(a.sources[i], backward ? a.from.cols(i) : a.stored.cols(i));
    a.pairs[i] = whole(a.sources[i], a.from.cols(i), 2);
  }
  int64_t most = 1;
  for (int s = 0; s < a.to.scales; ++s) {
    a.to_begin[s] = a.to.begin(s);
    a.input_quads[s] = a.stride == 1 && quads(a.inputs[s], a.to.cols(s));
    most = a.to.channels[s] > most ? a.to.channels[s] : most;
  }
  a.groups = static_cast<int>(least<int64_t>(most_groups, divide_up<int64_t>(most, outs_per_thread)));
  if (tensor_cores && a.groups == 3) a.groups = 4;  // a warp's tiles are divided by 1, 2 or 4
  for (int s = 0; s < a.to.scales; ++s)
    a.blocks.first[s + 1] = a.blocks.first[s] + a.to.batch * divide_up<int64_t>(a.to.rows(s), side) *
                                                    divide_up<int64_t>(a.to.cols(s), side) *
                                                    divide_up<int64_t>(a.to.channels[s], a.groups * outs_per_thread);
  const int64_t blocks = a.blocks.first[a.to.scales];
  const int threads = group_threads * a.groups;
  constexpr bool tc = tensor_cores;
  if (measured)
    return launch(kernel == 1 ? convolve<T, tc, 1, false, true> : convolve<T, tc, 3, false, true>, blocks, threads,
                  stream, a);
  if (kernel == 1)
    return launch(backward ? convolve<T, tc, 1, true> : convolve<T, tc, 1, false>, blocks, threads, stream, a);
  return launch(backward ? convolve<T, tc, 3, true> : convolve<T, tc, 3, false>, blocks, threads, stream, a);
}

template <class T>
cudaError_t run(Arguments<T>& a, int64_t kernel, bool backward, cudaStream_t stream, bool measured = false) {
  return on_tensor_cores<T>(
      [&](auto tensor_cores) { return run<T, decltype(tensor_cores)::value>(a, kernel, backward, stream, measured); });
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
