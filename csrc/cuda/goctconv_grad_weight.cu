// Cross-scale convolution: the gradient to its weight. See outer_product.h for the machine and its cost.
//
// Output scale j and input scale i meet at the coarser of the two: gradients finer than that come through the
// transpose of the upsampling, inputs finer than that through the max-pool, both on load.
#include "cuda/outer_product.h"
#include "cuda/resample.h"

namespace sodfast::cuda {
namespace {

constexpr int rows_per_thread = 8, patch_rows = 4 * rows_per_thread;

template <class T>
struct Problem {
  using A = typename Sum<T>::type;
  GOctConvShape shape;
  const T* gys[max_scales];
  const T* xs[max_scales];
  int64_t first[max_scales * max_scales + 1];  // first patch of the pair (j, i), pair = j * in.scales + i

  // A patch: rows from row0 on of output scale j, columns from col0 on of input scale i.
  struct Place {
    int j, i, at, row0, col0;
  };
  __device__ __forceinline__ Place place(int64_t block) const {
    int pair = 0;
    while (block >= first[pair + 1]) ++pair;
    Place p;
    p.j = pair / shape.in.scales, p.i = pair % shape.in.scales, p.at = p.j > p.i ? p.j : p.i;
    int64_t col;
    const int64_t row = divide(block - first[pair], divide_up<int64_t>(columns(p.i), patch_cols), col);
    p.row0 = static_cast<int>(row) * patch_rows, p.col0 = static_cast<int>(col) * patch_cols;
    return p;
  }
  __host__ __device__ __forceinline__ int64_t columns(int i) const {
    return shape.in.channels[i] * shape.kernel * shape.kernel;
  }
  __device__ __forceinline__ Patch patch(const Place& p) const {
    const int64_t k2 = shape.kernel * shape.kernel, pitch = shape.in.total() * k2;
    return {shape.out.batch,
            static_cast<int>(shape.out.rows(p.at)),
            static_cast<int>(shape.out.cols(p.at)),
            static_cast<int>(shape.out.channels[p.j]) - p.row0,
            static_cast<int>(columns(p.i)) - p.col0,
            (shape.out.begin(p.j) + p.row0) * pitch + shape.in.begin(p.i) * k2 + p.col0,
            pitch};
  }
  __device__ __forceinline__ A row(const Place& p, int r, int64_t b, int y, int x) const {
    const T* g = gys[p.j] + (b * shape.out.channels[p.j] + p.row0 + r) * shape.out.area(p.j);
    return lowered(g, static_cast<int>(shape.out.rows(p.j)), static_cast<int>(shape.out.cols(p.j)), y, x,
                   1 << (p.at - p.j));
  }
  __device__ __forceinline__ A col(const Place& p, int c, int64_t b, int y, int x) const {
    const int k = static_cast<int>(shape.kernel), column = p.col0 + c, channel = column / (k * k),
              tap = column % (k * k);
    y += tap / k - k / 2, x += tap % k - k / 2;
    if (y < 0 || y >= shape.out.rows(p.at) || x < 0 || x >= shape.out.cols(p.at)) return 0;
    const Plane<T> plane{xs[p.i] + (b * shape.in.channels[p.i] + channel) * shape.in.area(p.i),
                         static_cast<int>(shape.in.cols(p.i)), shape.stride == 2};
    return p.at == p.i ? plane.at(y, x) : plane.pooled(y, x, 1 << (p.at - p.i));
  }
};

// Fills `first` where there is one, and returns the number of slices.
int64_t plan(const GOctConvShape& shape, int64_t* first) {
  int64_t patches = 0, most_tiles = 0;
  const int64_t k2 = shape.kernel * shape.kernel;
  if (first != nullptr) first[0] = 0;
  for (int j = 0; j < shape.out.scales; ++j)
    for (int i = 0; i < shape.in.scales; ++i) {
      const int64_t here = divide_up<int64_t>(shape.out.channels[j], patch_rows) *
                           divide_up<int64_t>(shape.in.channels[i] * k2, patch_cols);
      const int at = j > i ? j : i;
      const int64_t tiles = shape.out.batch * divide_up<int64_t>(shape.out.rows(at), outer_rows) *
                            divide_up<int64_t>(shape.out.cols(at), outer_cols);
      patches += here;
      if (here > 0 && tiles > most_tiles) most_tiles = tiles;
      if (first != nullptr) first[j * shape.in.scales + i + 1] = patches;
    }
  return slice_count(patches, most_tiles, shape.out.total() * shape.in.total() * k2);
}

}  // namespace

int64_t goctconv_grad_weight_workspace(Type type, const GOctConvShape& shape) {
  const int64_t weights = shape.out.total() * shape.in.total() * shape.kernel * shape.kernel;
  return plan(shape, nullptr) * weights * (type == Type::f64 ? 8 : 4);
}

cudaError_t goctconv_grad_weight(Type type, const GOctConvShape& shape, Pointers gys, Pointers xs, void* gweight,
                                 void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Sum<T>::type;
    Problem<T> problem{};
    problem.shape = shape;
    for (int s = 0; s < shape.out.scales; ++s) problem.gys[s] = static_cast<const T*>(gys[s]);
    for (int s = 0; s < shape.in.scales; ++s) problem.xs[s] = static_cast<const T*>(xs[s]);
    const int64_t slices = plan(shape, problem.first), patches = problem.first[shape.out.scales * shape.in.scales],
                  weights = shape.out.total() * shape.in.total() * shape.kernel * shape.kernel;
    A* sums = static_cast<A*>(workspace);
    const cudaError_t error = launch(outer_product<Problem<T>, rows_per_thread>, patches * slices, outer_threads,
                                     stream, problem, sums, weights, slices);
    const Segments<T> out{{static_cast<T*>(gweight)}, {0, weights}, 1};
    return error != cudaSuccess ? error : add_all_slices(out, sums, slices, stream);
  });
}

}  // namespace sodfast::cuda
