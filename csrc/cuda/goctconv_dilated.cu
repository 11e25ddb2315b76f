// The dilated bank (CSNet's fusion, section 3.2): per scale, D parallel dense 3x3 convolutions with padding =
// dilation, their results one after the other along the channels; and the gradients.
//
//   y[o][p] = Σ_c Σ_t w[o][c][t] · x[c][p + dilation(o) · t]
//
// One launch for all scales. A block has 256 pixels of one scale and sample and 4 channels of one branch, a thread one
// pixel; weights come through shared memory 32 channels at a time, inputs straight from L1: a plane of the bank (56x56
// at most in CSNet) fits there, and the blocks of the other branches, which run next to each other, find it in L2. So
// device memory sees each input once. The gradient to the input walks all branches with the weights turned.
//
// 18·in FLOPs per output; 9 loads of L1 per 36 multiply-adds: the L1 bounds it, at about half of float32's peak.
#include "cuda/outer_product.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = 256, outs_per_block = 4, chunk = 32;

template <class T>
struct Arguments {
  DilatedShape shape;
  Pyramid from, to;
  const T* sources[max_scales];
  const T* weights[max_scales];
  T* targets[max_scales];
  const T *bias, *slope;
  BlockRanges blocks;
};

// Which taps of a pixel lie inside, as bits, for one dilation.
struct Taps {
  int inside = 0, rows = 0, cols = 0;
  int dilation;
  __device__ __forceinline__ Taps(int64_t wanted, int y, int x, int rows, int cols)
      : rows(rows),
        cols(cols),
        dilation(static_cast<int>(least<int64_t>(wanted, 1 << 30))) {
    for (int t = 0; t < 9; ++t) {
      const int64_t yy = int64_t(y) + (t / 3 - 1) * int64_t(dilation),
                    xx = int64_t(x) + (t % 3 - 1) * int64_t(dilation);
      if (yy >= 0 && yy < rows && xx >= 0 && xx < cols) inside |= 1 << t;
    }
  }
  template <class T>
  __device__ __forceinline__ typename Sum<T>::type value(const T* pixel, int t) const {
    if ((inside >> t & 1) == 0) return 0;
    return widen(pixel[(t / 3 - 1) * int64_t(dilation) * cols + (t % 3 - 1) * int64_t(dilation)]);
  }
};

// Two blocks per multiprocessor: left to itself the compiler spills registers for the sake of more.
template <class T, bool backward>
__global__ void __launch_bounds__(threads, 2) convolve(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ Pack<A, outs_per_block> weights[chunk * 9];
  int64_t rest, part;
  const int s = a.blocks.find(blockIdx.x, a.to.scales, rest);
  const DilatedShape& shape = a.shape;
  // The block's channels: of one branch forward, of any input channel backward.
  int64_t parts = 0;
  if (backward)
    parts = divide_up<int64_t>(a.to.channels[s], outs_per_block);
  else
    for (int d = 0; d < shape.dilations; ++d) parts += divide_up<int64_t>(shape.branch[s][d], outs_per_block);
  rest = divide(rest, parts, part);
  int branch = 0;
  int64_t out0 = 0, outs = a.to.channels[s];
  if (!backward) {
    for (;; ++branch) {
      outs = shape.branch[s][branch];
      const int64_t here = divide_up<int64_t>(outs, outs_per_block);
      if (part < here) break;
      part -= here, out0 += outs;
    }
  }
  outs -= part * outs_per_block, out0 += part * outs_per_block;
  if (outs > outs_per_block) outs = outs_per_block;

  const int64_t area = a.to.area(s);
  int64_t pixel_block;
  const int64_t b = divide(rest, divide_up<int64_t>(area, threads), pixel_block);
  const int64_t pixel = pixel_block * threads + threadIdx.x;
  const bool active = pixel < area;
  const int rows = static_cast<int>(a.to.rows(s)), cols = static_cast<int>(a.to.cols(s));
  int64_t col;
  const int y = static_cast<int>(divide(active ? pixel : 0, cols, col)), x = static_cast<int>(col);

  A sum[outs_per_block] = {};
  int64_t source0 = 0;  // first source channel of the branch
  for (int d = backward ? 0 : branch; d < (backward ? shape.dilations : branch + 1); ++d) {
    const Taps taps(shape.dilation[d], y, x, rows, cols);
    const int64_t sources = backward ? shape.branch[s][d] : a.from.channels[s];
    for (int64_t c0 = 0; c0 < sources; c0 += chunk) {
      const int count = static_cast<int>(least<int64_t>(chunk, sources - c0));
      for (int e = static_cast<int>(threadIdx.x); e < count * 9 * outs_per_block; e += threads) {
        const int o = e / (count * 9), line = e - o * count * 9, t = line % 9;
        const int64_t source = source0 + c0 + line / 9, target = out0 + o;
        A w = 0;
        if (o < outs)
          w = widen(a.weights[s][backward ? (source * a.to.channels[s] + target) * 9 + 8 - t
                                          : (target * a.from.channels[s] + source) * 9 + t]);
        weights[line].v[o] = w;
      }
      __syncthreads();
      if (active) {
        const T* plane = a.sources[s] + (b * a.from.channels[s] + source0 + c0) * area + pixel;
        for (int c = 0; c < count; ++c, plane += area) {
          A value[9];
#pragma unroll
          for (int t = 0; t < 9; ++t) value[t] = taps.value(plane, t);
#pragma unroll
          for (int t = 0; t < 9; ++t) {
            const Pack<A, outs_per_block> w = weights[c * 9 + t];
#pragma unroll
            for (int o = 0; o < outs_per_block; ++o) sum[o] += w.v[o] * value[t];
          }
        }
      }
      __syncthreads();
    }
    source0 += sources;
  }
  if (!active) return;
#pragma unroll
  for (int o = 0; o < outs_per_block; ++o) {
    if (o >= outs) continue;
    const int64_t parameter = a.to.begin(s) + out0 + o;
    const A z = sum[o] + (a.bias != nullptr ? widen(a.bias[parameter]) : A(0));
    narrow(a.slope != nullptr ? prelu(z, A(widen(a.slope[parameter]))) : z,
           a.targets[s][(b * a.to.channels[s] + out0 + o) * area + pixel]);
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
    a.blocks.first[s + 1] = a.blocks.first[s] + parts * a.to.batch * divide_up<int64_t>(a.to.area(s), threads);
  }
  return launch(backward ? convolve<T, true> : convolve<T, false>, a.blocks.first[a.to.scales], threads, stream, a);
}

// ----------------------------------------------------------------------------------- gradient to the weights
// The branch's outputs are few, so they are what is shifted: with q = p + dilation · t
//
//   gw[o][c][t] = Σ_q x[c][q] · g[o][q - dilation · t]
//
// has rows of inputs as they are stored and columns of outputs times taps.
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
  __device__ __forceinline__ void stage(const Place& p, const Quad& at, Pack<A, 4>* rows, Pack<A, 4>* cols) const {
    copy_lines(xs[p.s] + p.x + at.b * p.x_sample, p.plane, p.ins, p.cols, at, p.packed, rows);
    const T* planes = gys[p.s] + p.g + at.b * p.g_sample;
    if (p.shifted_packed)
      fill_lines<2>(9 * p.outs, cols, [&](int line) { return shifted<true>(planes, p, at, line); });
    else
      fill_lines<2>(9 * p.outs, cols, [&](int line) { return shifted<false>(planes, p, at, line); });
  }
  template <bool whole>
  __device__ __forceinline__ static Pack<T, 4> shifted(const T* planes, const Place& p, const Quad& at, int line) {
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
    const cudaError_t error = launch(outer_product<Problem<T>>, plan.patches * plan.slices, outer_threads, stream,
                                     problem, sums, weights, plan.slices);
    return error != cudaSuccess ? error : add_all_slices(out, sums, plan.slices, stream);
  });
}

}  // namespace sodfast::cuda
