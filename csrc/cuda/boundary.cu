// The boundary of soft maps, the sums of the structure polishing loss, and their gradients.
//
// Forward, one launch (the sums: a second one adds the blocks'): tiles as in boundary_tile.h. Bytes: a map read and
// written once, 8 per pixel in float32 (the sums: two maps read, 8), but that a tile's surroundings are read by its
// neighbours, from L2: (64 + k)² / 64² values each. Some 60 operations per pixel at any k: the aim is the bandwidth.
//
// Backward, two launches. The first makes the tiles again and leaves behind, in two bytes per pixel, how far into its
// window the maximum came first, along the row and down the column. As a window moves on, the place of its maximum
// never moves back: so all that a pixel gets from the windows of a column comes in one run, a thread walks down the
// column and adds it up in a register, then along the rows of those sums, and last every pixel asks the nine 3 x 3
// windows that see it whether it is their extreme. No atomics: one order. Bytes: 6 per pixel in the first launch, 14
// in the second in float32; for the loss the gradient of the truth's boundary is 4 more in each.
#include "cuda/boundary_tile.h"
#include "cuda/reduce.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = boundary_threads, warps = threads / 32;

struct Place {
  int64_t plane;
  int y0, x0;
};
// The tile of this block, `height` x `width` pixels.
__device__ __forceinline__ Place place_of_block(int rows, int cols, int height, int width) {
  int64_t across, down;
  const int64_t rest = divide(blockIdx.x, divide_up(cols, width), across);
  const int64_t plane = divide(rest, divide_up(rows, height), down);
  return {plane, static_cast<int>(down) * height, static_cast<int>(across) * width};
}
int64_t block_count(const BoundaryShape& shape, int64_t height, int64_t width) {
  return shape.planes * divide_up(shape.rows, height) * divide_up(shape.cols, width);
}

struct Arguments {
  int rows, cols, k, thin;
  int64_t pixels, tiles;  // of a plane
  const void *z, *truth, *gsums;
  void* out;
  double* partial;        // [block][6]
  uint8_t *along, *down;  // how far into its window the maximum is
  void* edge;             // the gradient of the boundary of sigmoid(z)
};

template <class T, bool logistic>
__device__ __forceinline__ BoundaryTile<T, logistic> tile_of(const Arguments& a, const void* maps, const Place& place) {
  return {static_cast<const T*>(maps) + place.plane * a.pixels, a.rows, a.cols, a.k, a.thin, place.y0, place.x0};
}

// Calls f(offset in the plane, i) for this thread's pixels inside the map.
template <class F>
__device__ __forceinline__ void for_each_pixel(const Arguments& a, const Place& place, const F& f) {
  const int x = place.x0 + my_col();
#pragma unroll
  for (int i = 0; i < per_thread; ++i) {
    const int y = place.y0 + my_row(i);
    if (x < a.cols && y < a.rows) f(static_cast<int64_t>(y) * a.cols + x, i);
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 3) thicken(const __grid_constant__ Arguments a) {
  using A = typename Sum<T>::type;
  __shared__ Key<A> tile[boundary_around * boundary_pitch];
  const Place place = place_of_block(a.rows, a.cols, boundary_side, boundary_side);
  Key<A> best[per_thread];
  thick_boundary(tile_of<T, false>(a, a.z, place), tile, best);
  T* out = static_cast<T*>(a.out) + place.plane * a.pixels;
  for_each_pixel(a, place, [&](int64_t at, int i) { narrow(value_of<A>(best[i]), out[at]); });
}

// ------------------------------------------------------------------------------- structure polishing
template <class T>
__global__ void __launch_bounds__(threads, 3) sum_maps(const __grid_constant__ Arguments a) {
  using A = typename Sum<T>::type;
  __shared__ Key<A> tile[boundary_around * boundary_pitch];
  const Place place = place_of_block(a.rows, a.cols, boundary_side, boundary_side);
  Key<A> of_map[per_thread], of_truth[per_thread];
  thick_boundary(tile_of<T, true>(a, a.z, place), tile, of_map);
  __syncthreads();
  thick_boundary(tile_of<T, false>(a, a.truth, place), tile, of_truth);
  const T* logits = static_cast<const T*>(a.z) + place.plane * a.pixels;
  const T* truth = static_cast<const T*>(a.truth) + place.plane * a.pixels;
  A total[6] = {0, 0, 0, 0, 0, 0};
  for_each_pixel(a, place, [&](int64_t at, int i) {
    const A p = sigmoid(widen(logits[at])), g = widen(truth[at]);
    const A bp = value_of<A>(of_map[i]), bg = value_of<A>(of_truth[i]);
    total[0] += p * g, total[1] += p, total[2] += g;
    total[3] += bp * bg, total[4] += bp, total[5] += bg;
  });
  write_partial<warps>(total, a.partial);
}

template <class T>
__global__ void __launch_bounds__(threads) finish_sums(const __grid_constant__ Arguments a) {
  double total[6];
  add_partials<warps>(a.partial, a.tiles, total);
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int i = 0; i < 6; ++i)
    narrow(static_cast<typename Sum<T>::type>(total[i]),
           static_cast<T*>(a.out)[6 * static_cast<int64_t>(blockIdx.x) + i]);
}

// -------------------------------------------------------------------------------------- the way back
// Leaves the places of the maxima behind, and for the loss (logistic) the gradient of the map's boundary.
template <class T, bool logistic>
__global__ void __launch_bounds__(threads, 3) trace(const __grid_constant__ Arguments a) {
  using A = typename Sum<T>::type;
  __shared__ Key<A> tile[boundary_around * boundary_pitch];
  const Place block = place_of_block(a.rows, a.cols, boundary_side, boundary_side);
  Key<A> best[per_thread];
  if (a.k > 1) {
    const int radius = a.k / 2;
    uint8_t* const along = a.along + block.plane * a.pixels;
    uint8_t* const down = a.down + block.plane * a.pixels;
    tile_of<T, logistic>(a, a.z, block).make_thin(tile);
    __syncthreads();
    pool_rows<true>(a.k, tile, [&](int row, int first, const int (&place)[windows]) {
      const int y = block.y0 + row - radius, x = block.x0 + first;
      if (row < radius || row >= radius + boundary_side || y >= a.rows) return;
      uint8_t* const to = along + static_cast<int64_t>(y) * a.cols + x;
      if (a.cols % windows == 0) {  // and so is the offset of every window of this
        Pack<uint8_t, windows> pack;
#pragma unroll
        for (int j = 0; j < windows; ++j) pack.v[j] = static_cast<uint8_t>(place[j]);
        if (x < a.cols) *reinterpret_cast<Pack<uint8_t, windows>*>(to) = pack;
      } else {
#pragma unroll
        for (int j = 0; j < windows; ++j)
          if (x + j < a.cols) to[j] = static_cast<uint8_t>(place[j]);
      }
    });
    int places[per_thread];
    pool_cols<true>(a.k, tile, best, places);
    for_each_pixel(a, block, [&](int64_t at, int i) { down[at] = static_cast<uint8_t>(places[i]); });
  }
  if constexpr (logistic) {
    __syncthreads();
    thick_boundary(tile_of<T, false>(a, a.truth, block), tile, best);
    const T* weights = static_cast<const T*>(a.gsums) + 6 * block.plane;
    const A of_product = widen(weights[3]), of_map = widen(weights[4]);
    A* edge = static_cast<A*>(a.edge) + block.plane * a.pixels;
    for_each_pixel(a, block, [&](int64_t at, int i) { edge[at] = of_product * value_of<A>(best[i]) + of_map; });
  }
}

constexpr int route_rows = 32, route_cols = 64;                        // pixels of a block
constexpr int thin_rows = route_rows + 2, thin_cols = route_cols + 2;  // t that they are part of
constexpr int window_cols = thin_cols + 2 * most_radius, run = 17;     // windows over it; outputs of a walk

template <class A>
struct Routes {
  A columns[thin_rows][window_cols + 1];      // summed down the columns
  A thin[thin_rows][thin_cols + 1];           // the gradient of t
  uint8_t along[thin_rows][window_cols + 4];  // an odd number of banks
  uint8_t extremes[thin_rows][thin_cols];     // the minimum's place in the 3 x 3 window, 16 · the maximum's
};
constexpr int nowhere = 0xff;

// Adds up what positions [first, last) get from the windows around them: grad(i) from window i, place(i) far in it.
template <class A, class Grad, class Where, class Out>
__device__ __forceinline__ void walk(int first, int last, int n, int radius, const Grad& grad, const Where& place,
                                     const Out& out) {
  int at = -1;
  A sum = 0;
  const int end = least(last + radius, n);
  for (int i = first - radius < 0 ? 0 : first - radius; i < end; ++i) {
    const int to = i - radius + place(i);
    if (to != at) {
      if (at >= first && at < last) out(at, sum);
      at = to, sum = 0;
    }
    sum += grad(i);
  }
  if (at >= first && at < last) out(at, sum);
}

// G: the type of the gradient of b.
template <class T, class G, bool logistic>
__global__ void __launch_bounds__(threads, 3) route(const __grid_constant__ Arguments a) {
  using A = typename Sum<T>::type;
  __shared__ Routes<A> shared;
  const Place block = place_of_block(a.rows, a.cols, route_rows, route_cols);
  const int thread = static_cast<int>(threadIdx.x), radius = a.k / 2, wide = thin_cols + 2 * radius;
  const int top = block.y0 - 1, left = block.x0 - 1;  // of `thin`; the windows begin `radius` columns before
  const int64_t start = block.plane * a.pixels;
  const G* const grad = (logistic ? static_cast<const G*>(a.edge) : static_cast<const G*>(a.gsums)) + start;
  const T* const z = static_cast<const T*>(a.z) + start;

  for (int e = thread; e < thin_rows / run * wide; e += threads) {
    const int half = e / wide, c = e - half * wide, x = left - radius + c, first = top + half * run;
    for (int i = 0; i < run; ++i) shared.columns[half * run + i][c] = 0;
    if (x < 0 || x >= a.cols) continue;
    walk<A>(
        first, first + run, a.rows, radius, [&](int y) { return widen(grad[static_cast<int64_t>(y) * a.cols + x]); },
        [&](int y) { return radius > 0 ? a.down[start + static_cast<int64_t>(y) * a.cols + x] : 0; },
        [&](int y, A sum) { shared.columns[y - top][c] = sum; });
  }
  for (int e = thread; e < thin_rows * wide; e += threads) {
    const int r = e / wide, c = e - r * wide, y = top + r, x = left - radius + c;
    const bool inside = y >= 0 && y < a.rows && x >= 0 && x < a.cols;
    shared.along[r][c] = inside && radius > 0 ? a.along[start + static_cast<int64_t>(y) * a.cols + x] : 0;
  }
  for (int e = thread; e < thin_rows * thin_cols; e += threads) {
    const int r = e / thin_cols, c = e - r * thin_cols, y = top + r, x = left + c;
    if (y < 0 || y >= a.rows || x < 0 || x >= a.cols) {
      shared.extremes[r][c] = nowhere;
      continue;
    }
    A low = 0, high = 0;
    int lowest = 0, highest = 0;
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      const int v = clamp(y + i / 3 - 1, a.rows), h = clamp(x + i % 3 - 1, a.cols);
      const A value = widen(z[static_cast<int64_t>(v) * a.cols + h]);
      const int place = 3 * (v - y + 1) + h - x + 1;
      if (i == 0 || value < low || value != value) low = value, lowest = place;
      if (i == 0 || value > high || value != value) high = value, highest = place;
    }
    shared.extremes[r][c] = static_cast<uint8_t>(lowest + 16 * highest);
  }
  __syncthreads();

  for (int e = thread; e < divide_up(thin_cols, run) * thin_rows; e += threads) {
    const int part = e / thin_rows, r = e - part * thin_rows, first = left + part * run;
    const int last = least(first + run, left + thin_cols), before = left - radius;
    for (int x = first; x < last; ++x) shared.thin[r][x - left] = 0;
    walk<A>(
        first, last, a.cols, radius, [&](int x) { return shared.columns[r][x - before]; },
        [&](int x) { return static_cast<int>(shared.along[r][x - before]); },
        [&](int x, A sum) { shared.thin[r][x - left] = sum; });
  }
  __syncthreads();

  const T* const weights = static_cast<const T*>(a.gsums) + 6 * block.plane;
  for (int e = thread; e < route_rows * route_cols; e += threads) {
    const int r = e / route_cols, c = e % route_cols, y = block.y0 + r, x = block.x0 + c;
    if (y >= a.rows || x >= a.cols) continue;
    const A own = shared.thin[r + 1][c + 1];
    A sum = a.thin == thin_erosion ? own : a.thin == thin_dilation ? -own : A(0);
#pragma unroll
    for (int i = 0; i < 9; ++i) {  // the window centred there: this pixel is its place 8 - i
      const int extremes = shared.extremes[r + i / 3][c + i % 3];
      const A of_window = shared.thin[r + i / 3][c + i % 3];
      if ((a.thin & thin_erosion) && (extremes & 15) == 8 - i) sum -= of_window;
      if ((a.thin & thin_dilation) && extremes >> 4 == 8 - i) sum += of_window;
    }
    const int64_t at = start + static_cast<int64_t>(y) * a.cols + x;
    if constexpr (logistic) {
      const A p = sigmoid(widen(static_cast<const T*>(a.z)[at])), g = widen(static_cast<const T*>(a.truth)[at]);
      sum = (sum + (widen(weights[0]) * g + widen(weights[1]))) * (p * (1 - p));
    }
    narrow(sum, static_cast<T*>(a.out)[at]);
  }
}

// ------------------------------------------------------------------------------------------- the host
constexpr int64_t align = 16, most_side = int64_t(1) << 30;

int64_t codes_of(const BoundaryShape& shape) {  // bytes of one kind of places
  return shape.k > 1 ? divide_up(shape.planes * shape.rows * shape.cols, align) * align : 0;
}

Arguments arguments_of(const BoundaryShape& shape) {
  Arguments a{};
  a.rows = static_cast<int>(shape.rows), a.cols = static_cast<int>(shape.cols);
  a.k = static_cast<int>(shape.k), a.thin = shape.thin, a.pixels = shape.rows * shape.cols;
  a.tiles = divide_up<int64_t>(shape.rows, boundary_side) * divide_up<int64_t>(shape.cols, boundary_side);
  return a;
}

// Calls f(T()) for a shape whose sides 32-bit positions can leave.
template <class F>
cudaError_t for_shape(Type type, const BoundaryShape& shape, const F& f) {
  return shape.rows < most_side && shape.cols < most_side ? for_type(type, f) : cudaErrorInvalidValue;
}

cudaError_t launch_tiles(void (*kernel)(Arguments), const BoundaryShape& shape, const Arguments& a,
                         cudaStream_t stream) {
  return launch(kernel, block_count(shape, boundary_side, boundary_side), threads, stream, a);
}

}  // namespace

cudaError_t boundary(Type type, const BoundaryShape& shape, const void* z, void* out, cudaStream_t stream) {
  Arguments a = arguments_of(shape);
  a.z = z, a.out = out;
  return for_shape(type, shape, [&](auto zero) { return launch_tiles(thicken<decltype(zero)>, shape, a, stream); });
}

int64_t boundary_backward_workspace(const BoundaryShape& shape) { return 2 * codes_of(shape); }

cudaError_t boundary_backward(Type type, const BoundaryShape& shape, const void* g, const void* z, void* gz,
                              void* workspace, cudaStream_t stream) {
  Arguments a = arguments_of(shape);
  a.z = z, a.gsums = g, a.out = gz;
  a.along = static_cast<uint8_t*>(workspace), a.down = a.along + codes_of(shape);
  return for_shape(type, shape, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t error = a.k > 1 ? launch_tiles(trace<T, false>, shape, a, stream) : cudaSuccess;
    if (error != cudaSuccess) return error;
    return launch(route<T, T, false>, block_count(shape, route_rows, route_cols), threads, stream, a);
  });
}

int64_t structure_polishing_sums_workspace(const BoundaryShape& shape) {
  return 6 * static_cast<int64_t>(sizeof(double)) * block_count(shape, boundary_side, boundary_side);
}

cudaError_t structure_polishing_sums(Type type, const BoundaryShape& shape, const void* logits, const void* truth,
                                     void* sums, void* workspace, cudaStream_t stream) {
  Arguments a = arguments_of(shape);
  a.z = logits, a.truth = truth, a.out = sums, a.partial = static_cast<double*>(workspace);
  return for_shape(type, shape, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t error = launch_tiles(sum_maps<T>, shape, a, stream);
    return error == cudaSuccess ? launch(finish_sums<T>, shape.planes, threads, stream, a) : error;
  });
}

int64_t structure_polishing_sums_backward_workspace(Type type, const BoundaryShape& shape) {
  const int64_t number = type == Type::f64 ? sizeof(double) : sizeof(float);
  return divide_up(shape.planes * shape.rows * shape.cols * number, align) * align + 2 * codes_of(shape);
}

cudaError_t structure_polishing_sums_backward(Type type, const BoundaryShape& shape, const void* gsums,
                                              const void* logits, const void* truth, void* glogits, void* workspace,
                                              cudaStream_t stream) {
  Arguments a = arguments_of(shape);
  a.z = logits, a.truth = truth, a.gsums = gsums, a.out = glogits, a.edge = workspace;
  a.along =
      static_cast<uint8_t*>(workspace) + structure_polishing_sums_backward_workspace(type, shape) - 2 * codes_of(shape);
  a.down = a.along + codes_of(shape);
  return for_shape(type, shape, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t error = launch_tiles(trace<T, true>, shape, a, stream);
    if (error != cudaSuccess) return error;
    return launch(route<T, typename Sum<T>::type, true>, block_count(shape, route_rows, route_cols), threads, stream,
                  a);
  });
}

}  // namespace sodfast::cuda
