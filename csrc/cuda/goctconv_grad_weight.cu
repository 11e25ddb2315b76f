// Cross-scale convolution: the gradient to its weight. See outer_product.h for the machine and its cost.
//
// Output scale j and input scale i meet at the coarser of the two: gradients finer than that come through the
// transpose of the upsampling, inputs finer than that through the max-pool, both on load. A patch has rows of output
// channels and columns of input channels, of 3x3 with all nine taps.
#include "cuda/depthwise_rows.h"
#include "cuda/outer_product.h"
#include "cuda/resample_quad.h"

namespace sodfast::cuda {
namespace {

// The patches of every pair (j, i) of an output and an input scale, pair = j * in.scales + i, and the slices.
struct Plan {
  Parts outs[max_scales], ins[max_scales];
  int64_t first[max_scales * max_scales + 1] = {};  // first patch of a pair
  int64_t patches = 0, weights = 0, slices = 1;
  Plan() = default;
  explicit Plan(const GOctConvShape& shape) {
    const int64_t k2 = shape.kernel * shape.kernel;
    for (int j = 0; j < shape.out.scales; ++j) outs[j] = Parts(shape.out.channels[j], patch_rows, rows_per_thread);
    for (int i = 0; i < shape.in.scales; ++i)
      ins[i] = Parts(shape.in.channels[i], patch_cols / k2, k2 == 1 ? cols_per_thread : 1);
    int64_t most_tiles = 0;
    for (int j = 0; j < shape.out.scales; ++j)
      for (int i = 0; i < shape.in.scales; ++i) {
        const int64_t here = static_cast<int64_t>(outs[j].count) * ins[i].count;
        const int64_t tiles = tiles_of(shape.out, j > i ? j : i);
        if (here > 0 && tiles > most_tiles) most_tiles = tiles;
        first[j * shape.in.scales + i + 1] = patches += here;
      }
    weights = shape.out.total() * shape.in.total() * k2;
    slices = slice_count(patches, most_tiles, weights);
  }
};

template <class T, int k>
struct Problem {
  using Stored = T;
  using A = typename Sum<T>::type;
  GOctConvShape shape;
  const T* gys[max_scales];
  const T* xs[max_scales];
  bool packed_g[max_scales], packed_x[max_scales];  // rows of whole, aligned quads
  Plan plan;

  // Channels of one scale.
  struct Maps {
    int64_t first, sample, plane;  // where the first of them begins; distances of samples and of planes
    int s, count, rows, cols;      // the scale, how many, and a plane as it is stored
    int factor;                    // by which they are finer than where the scales meet
    bool packed;
  };
  struct Place {
    Maps g, x;
    int rows, cols;         // where the scales meet
    int64_t weight, pitch;  // the first weight, and the distance of two output channels' weights
  };
  __device__ __forceinline__ Place place(int64_t block) const {
    int pair = 0;
    while (block >= plan.first[pair + 1]) ++pair;
    const int j = pair / shape.in.scales, i = pair % shape.in.scales, at = j > i ? j : i;
    const Parts &outs = plan.outs[j], &ins = plan.ins[i];
    const int part = static_cast<int>(block - plan.first[pair]);
    const int out0 = part / ins.count * outs.size, in0 = part % ins.count * ins.size;
    Place p;
    p.g = maps(shape.out, j, out0, outs.size, at, packed_g[j]);
    p.x = maps(shape.in, i, in0, ins.size, at, packed_x[i]);
    p.rows = static_cast<int>(shape.out.rows(at)), p.cols = static_cast<int>(shape.out.cols(at));
    p.pitch = shape.in.total() * k * k;
    p.weight = (shape.out.begin(j) + out0) * p.pitch + (shape.in.begin(i) + in0) * k * k;
    return p;
  }
  __device__ __forceinline__ static Maps maps(const Pyramid& pyramid, int s, int first, int most, int at, bool packed) {
    const int64_t area = pyramid.area(s);
    return {first * area,
            pyramid.channels[s] * area,
            area,
            s,
            static_cast<int>(least<int64_t>(most, pyramid.channels[s] - first)),
            static_cast<int>(pyramid.rows(s)),
            static_cast<int>(pyramid.cols(s)),
            1 << (at - s),
            packed};
  }
  __device__ __forceinline__ Patch patch(const Place& p) const {
    return {shape.out.batch, p.rows, p.cols, p.g.count, p.x.count * k * k};
  }
  __device__ __forceinline__ int64_t weight(const Place& p, int row, int col) const {
    return p.weight + row * p.pitch + col;
  }
  __device__ __forceinline__ void stage(const Place& p, const Quad& at, Lines<A> rows, Lines<A> cols) const {
    stage_gradients(p, at, rows);
    stage_inputs(p, at, cols);
  }

  __device__ __forceinline__ void stage_gradients(const Place& p, const Quad& at, Lines<A> lines) const {
    const Maps& g = p.g;
    const T* planes = gys[g.s] + g.first + at.b * g.sample;
    if (g.factor == 1) {
      copy_lines(planes, g.plane, g.count, g.cols, at, g.packed, lines);
    } else if (g.factor == 2 && g.packed) {
      fill_lines<1>(g.count, lines, [&](int line) {
        return at.count > 0 ? lowered_quad(planes + line * g.plane, p.rows, p.cols, at.y, at.x) : Pack<A, 4>{};
      });
    } else {
      fill_lines<1>(g.count, lines, [&](int line) {
        return lowered_quad(planes + line * g.plane, p.rows, p.cols, at.y, at.x, g.factor);
      });
    }
  }

  __device__ __forceinline__ void stage_inputs(const Place& p, const Quad& at, Lines<A> lines) const {
    const Maps& x = p.x;
    const T* planes = xs[x.s] + x.first + at.b * x.sample;
    const bool averaged = shape.stride == 2, as_stored = x.factor == 1 && !averaged;
    const auto plane = [&](int line) { return Plane<T>{planes + line * x.plane, x.cols, averaged}; };
    if (k == 3) {  // row dy of a channel's taps makes three lines
      const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
      for (int r = static_cast<int>(threadIdx.x) / 32; r < 3 * x.count; r += outer_warps) {
        const int y = at.y + r % 3 - 1;
        A v[6];
        if (as_stored)
          read_row(planes + r / 3 * x.plane, y, at.x, x.rows, x.cols, x.packed, v);
        else
          read_pooled(plane(r / 3), y, at.x - 1, p.rows, p.cols, x.factor, v);
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
          Pack<A, 4> line;
#pragma unroll
          for (int c = 0; c < 4; ++c) line.v[c] = c < at.count ? v[dx + c] : A(0);
          lines.at(3 * r + dx, lane) = line;
        }
      }
    } else if (as_stored) {
      copy_lines(planes, x.plane, x.count, x.cols, at, x.packed, lines);
    } else if (x.factor == 2 && !averaged && x.packed) {
      const HalvedQuad<T> halved(x.cols, at.y, at.x, p.cols);
      fill_lines<2>(x.count, lines, [&](int line) {
        return at.count > 0 ? halved.finish(halved.load(planes + line * x.plane)) : Pack<A, 4>{};
      });
    } else {
      fill_lines<1>(x.count, lines, [&](int line) {
        Pack<A, 4> v{};
        if (at.count > 0) read_pooled(plane(line), at.y, at.x, p.rows, p.cols, x.factor, v.v);
        return v;
      });
    }
  }
};

template <class T, int k>
cudaError_t run(const GOctConvShape& shape, Pointers gys, Pointers xs, void* gweight, void* workspace,
                cudaStream_t stream) {
  Problem<T, k> problem{};
  problem.shape = shape, problem.plan = Plan(shape);
  for (int s = 0; s < shape.out.scales; ++s) {
    problem.gys[s] = static_cast<const T*>(gys[s]);
    problem.packed_g[s] = whole_quads<T>(gys[s], shape.out.cols(s));
  }
  for (int s = 0; s < shape.in.scales; ++s) {
    problem.xs[s] = static_cast<const T*>(xs[s]);
    problem.packed_x[s] = whole_quads<T>(xs[s], shape.in.cols(s));
  }
  const Plan& plan = problem.plan;
  auto* sums = static_cast<typename Sum<T>::type*>(workspace);
  const cudaError_t error = launch_outer_product(problem, sums, plan.patches, plan.weights, plan.slices, stream);
  const Segments<T> out{{static_cast<T*>(gweight)}, {0, plan.weights}, 1};
  return error != cudaSuccess ? error : add_all_slices(out, sums, plan.slices, stream);
}

}  // namespace

int64_t goctconv_grad_weight_workspace(Type type, const GOctConvShape& shape) {
  const Plan plan(shape);
  return plan.slices * plan.weights * (type == Type::f64 ? 8 : 4);
}

cudaError_t goctconv_grad_weight(Type type, const GOctConvShape& shape, Pointers gys, Pointers xs, void* gweight,
                                 void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto of_kernel = shape.kernel == 1 ? run<T, 1> : run<T, 3>;
    return of_kernel(shape, gys, xs, gweight, workspace, stream);
  });
}

}  // namespace sodfast::cuda
