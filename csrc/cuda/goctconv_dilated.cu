// The dilated bank (CSNet's fusion, section 3.2): per scale, D parallel dense 3x3 convolutions with padding =
// dilation, their results one after the other along the channels; and the gradients.
//
//   y[o][p] = Σ_c Σ_t w[o][c][t] · x[c][p + dilation(o) · t]
//
// One launch for all scales. A thread has a quad of pixels (4 in a row) of one scale and up to 8 channels of one
// branch, a block 256 quads, of as many samples as that makes. Weights come through shared memory 32 channels at a
// time, inputs straight from L1, 16 bytes an access where rows are aligned and the dilation is 1, 2 or a multiple of 4;
// the blocks of the other branches, which run next to each other, find them in L2. So device memory sees each input
// once. The gradient to the input walks all branches with the weights turned.
//
// 18·in FLOPs per output; 9 loads for 36 multiply-adds with every channel of the thread: float32 arithmetic bounds it,
// and the aim is half of its peak (a branch has an odd number of channels, and loads take their share).
#include <type_traits>

#include "cuda/outer_product.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = 256, outs_per_block = 8, chunk = 32;

template <class T>
struct Arguments {
  DilatedShape shape;
  Pyramid from, to;
  const T* sources[max_scales];
  const T* weights[max_scales];
  T* targets[max_scales];
  bool packed[max_scales];  // rows of sources and targets are whole, aligned quads
  const T *bias, *slope;
  BlockRanges blocks;
};

// How a quad and its neighbours `dilation` to the left and right are read: for a dilation of 1 or 2 from the three
// quads around, for a multiple of 4 as quads, else (and where rows are not aligned) one by one.
enum class Reach { one = 1, two = 2, quads, any };

template <Reach reach, class T, class A>
__device__ __forceinline__ void read_taps(const T* row, int x, int cols, int count, int dilation, A (&v)[3][4]) {
  constexpr bool near = reach == Reach::one || reach == Reach::two;
  A around[12];
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    const Pack<T, 4> quad =
        pack_of(read_quad<reach != Reach::any>(row, x + (n - 1) * (near ? 4 : dilation), cols, count));
#pragma unroll
    for (int p = 0; p < 4; ++p) around[4 * n + p] = widen(quad.v[p]);
  }
#pragma unroll
  for (int dx = 0; dx < 3; ++dx)
#pragma unroll
    for (int p = 0; p < 4; ++p) v[dx][p] = around[near ? 4 + p + (dx - 1) * static_cast<int>(reach) : 4 * dx + p];
}

// Adds `count` channels, the first of them `planes`, to the sums of a quad.
template <Reach reach, class T, class A>
__device__ __forceinline__ void add_channels(const T* planes, int64_t area, int count, const Quad& at, int rows,
                                             int cols, int dilation, const Pack<A, 2>* weights, int outs,
                                             A (&sum)[outs_per_block][4]) {
#pragma unroll 1
  for (int c = 0; c < count; ++c, planes += area) {
#pragma unroll
    for (int dy = 0; dy < 3; ++dy) {
      const int y = at.y + (dy - 1) * dilation;
      const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(rows);
      A v[3][4];
      read_taps<reach>(planes + static_cast<int64_t>(y) * cols, at.x, cols, inside ? at.count : 0, dilation, v);
      // Outputs two by two: most branches have fewer than eight.
#pragma unroll
      for (int pair = 0; pair < outs_per_block / 2; ++pair) {
        if (2 * pair >= outs) break;
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
          const Pack<A, 2> w = weights[(c * 9 + dy * 3 + dx) * (outs_per_block / 2) + pair];
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int p = 0; p < 4; ++p) sum[2 * pair + i][p] += w.v[i] * v[dx][p];
        }
      }
    }
  }
}

template <class T, bool backward>
__global__ void __launch_bounds__(threads, 2) convolve(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ Pack<A, 2> weights[chunk * 9 * outs_per_block / 2];
  __shared__ int shared_dilation;
  int64_t rest, part;
  const int s = a.blocks.find(blockIdx.x, a.to.scales, rest);
  const DilatedShape& shape = a.shape;
  // The block's channels: of one branch forward, of any input channel backward.
  int64_t parts = 0;
  if (backward)
    parts = divide_up<int64_t>(a.to.channels[s], outs_per_block);
  else
    for (int d = 0; d < shape.dilations; ++d) parts += divide_up<int64_t>(shape.branch[s][d], outs_per_block);
  const int64_t quad = divide(rest, parts, part) * threads + threadIdx.x;
  int branch = 0;
  int64_t out0 = 0, left = a.to.channels[s];
  if (!backward) {
    for (;; ++branch) {
      left = shape.branch[s][branch];
      const int64_t here = divide_up<int64_t>(left, outs_per_block);
      if (part < here) break;
      part -= here, out0 += left;
    }
  }
  left -= part * outs_per_block, out0 += part * outs_per_block;
  const int outs = static_cast<int>(least<int64_t>(left, outs_per_block));

  const int rows = static_cast<int>(a.to.rows(s)), cols = static_cast<int>(a.to.cols(s));
  const int64_t area = a.to.area(s), quads_across = divide_up(cols, 4), quads = a.to.batch * rows * quads_across;
  int64_t quad_x, row;
  Quad at;
  at.b = divide(divide(least(quad, quads - 1), quads_across, quad_x), rows, row);
  at.y = static_cast<int>(row), at.x = static_cast<int>(quad_x) * 4;
  at.count = quad < quads ? least(4, cols - at.x) : 0;

  A sum[outs_per_block][4] = {};
  int source0 = 0;  // first source channel of the branch
  for (int d = backward ? 0 : branch; d < (backward ? shape.dilations : branch + 1); ++d) {
    const int sources = static_cast<int>(backward ? shape.branch[s][d] : a.from.channels[s]);
    for (int c0 = 0; c0 < sources; c0 += chunk) {
      const int count = least(chunk, sources - c0);
      __syncthreads();                                               // the last chunk's readers
      const int64_t stride = backward ? 9 : a.from.channels[s] * 9;  // of two outputs' weights
#pragma unroll 1
      for (int line = static_cast<int>(threadIdx.x); line < count * 9; line += threads) {
        const int64_t source = source0 + c0 + line / 9;
        const int t = line % 9;
        const T* w = a.weights[s] + (backward ? (source * a.to.channels[s] + out0) * 9 + 8 - t
                                              : (out0 * a.from.channels[s] + source) * 9 + t);
#pragma unroll
        for (int o = 0; o < outs_per_block; ++o, w += stride)
          weights[(line * outs_per_block + o) / 2].v[o % 2] = o < outs ? widen(*w) : A(0);
      }
      // Through shared memory, or the places of all taps would be worked out before the loop, for each way to read
      // them, and crowd out the sums. A larger dilation reaches nothing more, and this one keeps places in 32 bits.
      if (threadIdx.x == 0)
        shared_dilation = static_cast<int>(least<int64_t>(shape.dilation[d], rows > cols ? rows : cols));
      __syncthreads();
      const int dilation = shared_dilation;
      const T* planes = a.sources[s] + (at.b * a.from.channels[s] + source0 + c0) * area;
      const auto add = [&](auto reach) {
        add_channels<decltype(reach)::value>(planes, area, count, at, rows, cols, dilation, weights, outs, sum);
      };
      if (a.packed[s] && dilation == 1)
        add(std::integral_constant<Reach, Reach::one>());
      else if (a.packed[s] && dilation == 2)
        add(std::integral_constant<Reach, Reach::two>());
      else if (a.packed[s] && dilation % 4 == 0)
        add(std::integral_constant<Reach, Reach::quads>());
      else
        add(std::integral_constant<Reach, Reach::any>());
    }
    source0 += sources;
  }
  const int64_t parameter = a.to.begin(s) + out0;
#pragma unroll
  for (int o = 0; o < outs_per_block; ++o) {
    if (o >= outs) break;
    const A bias = a.bias != nullptr ? widen(a.bias[parameter + o]) : A(0);
    Pack<T, 4> result;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const A z = sum[o][p] + bias;
      narrow(a.slope != nullptr ? prelu(z, A(widen(a.slope[parameter + o]))) : z, result.v[p]);
    }
    T* target = a.targets[s] + (at.b * a.to.channels[s] + out0 + o) * area + static_cast<int64_t>(at.y) * cols + at.x;
    if (a.packed[s] && at.count > 0) {
      *reinterpret_cast<Pack<T, 4>*>(target) = result;
    } else {
#pragma unroll
      for (int p = 0; p < 4; ++p)
        if (p < at.count) target[p] = result.v[p];
    }
  }
}

template <class T>
cudaError_t run(Arguments<T>& a, bool backward, cudaStream_t stream) {
  for (int s = 0; s < a.to.scales; ++s) {
    int64_t parts = 0;
    if (backward)
      parts = divide_up<int64_t>(a.to.channels[s], outs_per_block);
    else
      for (int d = 0; d < a.shape.dilations; ++d) parts += divide_up<int64_t>(a.shape.branch[s][d], outs_per_block);
    const int64_t cols = a.to.cols(s), quads = a.to.batch * a.to.rows(s) * divide_up<int64_t>(cols, 4);
    a.blocks.first[s + 1] = a.blocks.first[s] + parts * divide_up<int64_t>(quads, threads);
    a.packed[s] = whole_quads<T>(a.sources[s], cols) && whole_quads<T>(a.targets[s], cols);
  }
  return launch(backward ? convolve<T, true> : convolve<T, false>, a.blocks.first[a.to.scales], threads, stream, a);
}

// ----------------------------------------------------------------------------------- gradient to the weights
// The branch's outputs are few, so they are what is shifted: with q = p + dilation · t
//
//   gw[o][c][t] = Σ_q x[c][q] · g[o][q - dilation · t]
//
// has rows of inputs as they are stored and columns of outputs times taps. A NaN or an infinity in x
// therefore reaches all nine taps, also one whose pixel lies outside.

// The patches of every branch (s, d), branch = s * dilations + d, and the slices.
struct Plan {
  Parts ins[max_scales], outs[max_scales][max_dilations];
  int64_t first[max_scales * max_dilations + 1] = {};  // first patch of a branch
  int64_t weights[max_scales + 1] = {};                // first weight of a scale
  int64_t patches = 0, slices = 1;
  Plan() = default;
  explicit Plan(const DilatedShape& shape) {
    int64_t most_tiles = 0;
    const int scales = shape.in.scales;
    for (int s = 0; s < scales; ++s) {
      ins[s] = Parts(shape.in.channels[s], patch_rows, rows_per_thread);
      for (int d = 0; d < shape.dilations; ++d) {
        outs[s][d] = Parts(shape.branch[s][d], patch_cols / 9, 1);
        const int64_t here = static_cast<int64_t>(ins[s].count) * outs[s][d].count, tiles = tiles_of(shape.in, s);
        if (here > 0 && tiles > most_tiles) most_tiles = tiles;
        first[s * shape.dilations + d + 1] = patches += here;
      }
      weights[s + 1] = weights[s] + shape.out.channels[s] * shape.in.channels[s] * 9;
    }
    slices = slice_count(patches, most_tiles, weights[scales]);
  }
};

template <class T>
struct Problem {
  using Stored = T;
  using A = typename Sum<T>::type;
  DilatedShape shape;
  const T* gys[max_scales];
  const T* xs[max_scales];
  bool packed[max_scales];  // rows of whole, aligned quads
  Plan plan;

  // Some inputs of scale s, and some outputs of one branch.
  struct Place {
    int64_t x, g;  // where the first channels begin, in the first sample
    int64_t x_sample, g_sample, plane;
    int s, rows, cols, ins, outs, dilation;
    bool packed, shifted_packed;  // inputs; and gradients, whose quads may begin anywhere
    int64_t weight, pitch;        // the first weight, and the distance of two outputs' weights
  };
  __device__ __forceinline__ Place place(int64_t block) const {
    Place p;
    int branch = 0;
    while (block >= plan.first[branch + 1]) ++branch;
    const int s = branch / shape.dilations, d = branch % shape.dilations;
    const Parts &ins = plan.ins[s], &outs = plan.outs[s][d];
    const int part = static_cast<int>(block - plan.first[branch]);
    const int in0 = part / outs.count * ins.size, out0 = part % outs.count * outs.size;
    int64_t channel0 = out0;  // of the scale
    for (int e = 0; e < d; ++e) channel0 += shape.branch[s][e];
    p.plane = shape.in.area(s);
    p.x_sample = shape.in.channels[s] * p.plane, p.g_sample = shape.out.channels[s] * p.plane;
    p.s = s, p.x = in0 * p.plane, p.g = channel0 * p.plane;
    p.ins = static_cast<int>(least<int64_t>(ins.size, shape.in.channels[s] - in0));
    p.outs = static_cast<int>(least<int64_t>(outs.size, shape.branch[s][d] - out0));
    p.rows = static_cast<int>(shape.in.rows(s)), p.cols = static_cast<int>(shape.in.cols(s));
    // A larger dilation reaches nothing more, and this one lets pixels' places stay in 32 bits.
    p.dilation = static_cast<int>(least<int64_t>(shape.dilation[d], p.rows > p.cols ? p.rows : p.cols));
    p.packed = packed[s], p.shifted_packed = packed[s] && p.dilation % 4 == 0;
    p.pitch = shape.in.channels[s] * 9;
    p.weight = plan.weights[s] + channel0 * p.pitch + in0 * 9;
    return p;
  }
  __device__ __forceinline__ Patch patch(const Place& p) const {
    return {shape.in.batch, p.rows, p.cols, p.ins, p.outs * 9};
  }
  __device__ __forceinline__ int64_t weight(const Place& p, int row, int col) const {
    return p.weight + col / 9 * p.pitch + row * 9 + col % 9;
  }
  __device__ __forceinline__ void stage(const Place& p, const Quad& at, Lines<A> rows, Lines<A> cols) const {
    copy_lines(xs[p.s] + p.x + at.b * p.x_sample, p.plane, p.ins, p.cols, at, p.packed, rows);
    const T* planes = gys[p.s] + p.g + at.b * p.g_sample;
    if (p.shifted_packed)
      fill_lines<2>(9 * p.outs, cols, [&](int line) { return shifted<true>(planes, p, at, line); });
    else
      fill_lines<2>(9 * p.outs, cols, [&](int line) { return shifted<false>(planes, p, at, line); });
  }
  template <bool whole>
  __device__ __forceinline__ static auto shifted(const T* planes, const Place& p, const Quad& at, int line) {
    const int t = line % 9, y = at.y - (t / 3 - 1) * p.dilation, x = at.x - (t % 3 - 1) * p.dilation;
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(p.rows);
    const T* row = planes + line / 9 * p.plane + static_cast<int64_t>(y) * p.cols;
    return read_quad<whole>(row, x, p.cols, inside ? at.count : 0);
  }
};

}  // namespace

cudaError_t dilated(Type type, const DilatedShape& shape, Pointers xs, Pointers weights, const void* bias,
                    const void* slope, MutablePointers ys, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a{};
    a.shape = shape, a.from = shape.in, a.to = shape.out;
    for (int s = 0; s < shape.in.scales; ++s) {
      a.sources[s] = static_cast<const T*>(xs[s]), a.weights[s] = static_cast<const T*>(weights[s]);
      a.targets[s] = static_cast<T*>(ys[s]);
    }
    a.bias = static_cast<const T*>(bias), a.slope = static_cast<const T*>(slope);
    return run(a, false, stream);
  });
}

cudaError_t dilated_grad_input(Type type, const DilatedShape& shape, Pointers gys, Pointers weights,
                               MutablePointers gxs, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a{};
    a.shape = shape, a.from = shape.out, a.to = shape.in;
    for (int s = 0; s < shape.in.scales; ++s) {
      a.sources[s] = static_cast<const T*>(gys[s]), a.weights[s] = static_cast<const T*>(weights[s]);
      a.targets[s] = static_cast<T*>(gxs[s]);
    }
    return run(a, true, stream);
  });
}

int64_t dilated_grad_weight_workspace(Type type, const DilatedShape& shape) {
  const Plan plan(shape);
  return plan.slices * plan.weights[shape.in.scales] * (type == Type::f64 ? 8 : 4);
}

cudaError_t dilated_grad_weight(Type type, const DilatedShape& shape, Pointers gys, Pointers xs,
                                MutablePointers gweights, void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Sum<T>::type;
    Problem<T> problem{};
    problem.plan = Plan(shape);
    const Plan& plan = problem.plan;
    const int scales = shape.in.scales;
    Segments<T> out{};
    problem.shape = shape, out.count = scales;
    for (int s = 0; s < scales; ++s) {
      problem.gys[s] = static_cast<const T*>(gys[s]), problem.xs[s] = static_cast<const T*>(xs[s]);
      problem.packed[s] = whole_quads<T>(gys[s], shape.in.cols(s)) && whole_quads<T>(xs[s], shape.in.cols(s));
      out.data[s] = static_cast<T*>(gweights[s]), out.first[s + 1] = plan.weights[s + 1];
    }
    A* sums = static_cast<A*>(workspace);
    const int64_t weights = plan.weights[scales];
    const cudaError_t error = launch_outer_product(problem, sums, plan.patches, weights, plan.slices, stream);
    return error != cudaSuccess ? error : add_all_slices(out, sums, plan.slices, stream);
  });
}

}  // namespace sodfast::cuda
