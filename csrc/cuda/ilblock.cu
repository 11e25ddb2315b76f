// A whole fused ILBlock (CSNet, section 3.2) in one launch: the cross-scale convolution of goctconv.cu, then two
// depthwise 3x3, each with bias and PReLU; every output scale at once, nothing between the layers in memory.
//
//   u_j = f1(Σ_{i<=j} W_ji * pool(x_i) + Σ_{i>j} up(W_ji * x_i)),   y_j = f3(w3 ⊛ f2(w2 ⊛ u_j)),   f(z) = prelu(z + b)
//
// A block has a tile of one scale and sample: see ilblock_tile.h.
//
// Bytes: the input (again for every 16 channels, from L2) and the output once; layer by layer it is three times the
// output and twice u more. FLOPs per output pixel and channel: 2·in·k² and 36, of which the halo repeats the first
// 576 / 392 = 1.47 times. Where in·k² passes some 250, multiplied lane by lane in float32, that costs more time than
// the bytes saved: there the layers run one by one (ilblock_is_one_launch). The aim is the bandwidth.
#include "cuda/ilblock_tile.h"

namespace sodfast::cuda {
namespace {

template <class T, int k, bool tensor_cores>
__global__ void __launch_bounds__(group_threads* most_groups, tensor_cores ? most_resident : 2)
    ilblock_tile(const __grid_constant__ Arguments<T> a) {
  using Work = Tile<T, k, tensor_cores>;
  __shared__ typename Work::Shared shared;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  int64_t rest, part;
  const int s = a.blocks.find(blockIdx.x, a.to.scales, rest);
  const int outs_per_block = a.groups * outs_per_thread;
  rest = divide(rest, divide_up<int64_t>(a.to.channels[s], outs_per_block), part);
  const int out0 = static_cast<int>(part) * outs_per_block;
  rest = divide(rest, divide_up<int64_t>(a.to.cols(s), tile_cols), part);
  const int x0 = static_cast<int>(part) * tile_cols;
  rest = divide(rest, divide_up<int64_t>(a.to.rows(s), tile_rows), part);
  const int y0 = static_cast<int>(part) * tile_rows;
  Work work{a,
            shared,
            s,
            rest,
            y0,
            x0,
            out0,
            static_cast<int>(least<int64_t>(outs_per_block, a.to.channels[s] - out0)),
            thread / group_threads,
            warp % row_groups * rows_per_thread,
            thread % 32};
  if (k != 1)
    for (int i = a.from.scales - 1; i > s; --i) work.add_apart(i);
  for (int i = 0; i < (k == 1 ? a.from.scales : least(s + 1, a.from.scales)); ++i) work.add(i);
  if constexpr (tensor_cores)
    work.fill_window_from_tiles();
  else
    work.fill_window();
  __syncthreads();
  for (int c = warp; c < work.outs; c += static_cast<int>(blockDim.x) / 32) work.run_depthwise(c);
}

template <class T>
cudaError_t run(void (*kernel)(Arguments<T>), Arguments<T>& a, cudaStream_t stream) {
  for (int s = 0; s < a.to.scales; ++s)
    a.blocks.first[s + 1] = a.blocks.first[s] + a.to.batch * divide_up<int64_t>(a.to.rows(s), tile_rows) *
                                                    divide_up<int64_t>(a.to.cols(s), tile_cols) *
                                                    divide_up<int64_t>(a.to.channels[s], a.groups * outs_per_thread);
  return launch(kernel, a.blocks.first[a.to.scales], group_threads * a.groups, stream, a);
}

}  // namespace

// A 1x1 convolution of 2x2 averages: no network has one, and the launch would need one more way to read a source.
static bool averages_pixels(const GOctConvShape& shape) { return shape.kernel == 1 && shape.stride == 2; }

bool ilblock_is_one_launch(const GOctConvShape& shape) {
  return !averages_pixels(shape) && shape.in.total() * shape.kernel * shape.kernel <= most_work;
}

cudaError_t ilblock(Type type, const GOctConvShape& shape, Pointers xs, Pointers weights, Pointers biases,
                    Pointers slopes, MutablePointers ys, cudaStream_t stream) {
  if (averages_pixels(shape)) return cudaErrorInvalidValue;
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a{};
    a.from = shape.in, a.to = shape.out, a.stored = shape.in;
    a.from.height = shape.out.height, a.from.width = shape.out.width;
    for (int i = 0; i < a.from.scales; ++i) {
      a.sources[i] = static_cast<const T*>(xs[i]);
      a.pairs[i] =
          shape.stride == 1 && a.from.cols(i) % 2 == 0 && reinterpret_cast<uintptr_t>(xs[i]) % (2 * sizeof(T)) == 0;
      a.from_begin[i] = a.from.begin(i);
    }
    for (int l = 0; l < 3; ++l)
      a.layers[l] = {static_cast<const T*>(weights[l]), static_cast<const T*>(biases[l]),
                     static_cast<const T*>(slopes[l])};
    a.weight_cols = shape.in.total(), a.stride = static_cast<int>(shape.stride);
    int64_t most = 1;
    for (int s = 0; s < a.to.scales; ++s) most = a.to.channels[s] > most ? a.to.channels[s] : most;
    a.groups = static_cast<int>(least<int64_t>(most_groups, divide_up<int64_t>(most, outs_per_thread)));
    for (int s = 0; s < a.to.scales; ++s) a.targets[s] = static_cast<T*>(ys[s]), a.to_begin[s] = a.to.begin(s);
    if (shape.kernel == 3) return run(ilblock_tile<T, 3, false>, a, stream);
    return on_tensor_cores<T>([&](auto tensor_cores) {
      if (tensor_cores) a.groups = most_groups;  // they take 16 channels
      return run(ilblock_tile<T, 1, decltype(tensor_cores)::value>, a, stream);
    });
  });
}

}  // namespace sodfast::cuda
