// Gradients to the weights of dense convolutions: gW[row][col] = Σ over samples and pixels of g[row] · x[col], where
// rows and columns are lines of pixels: channels of maps as they are stored, or pooled, lowered or shifted on load.
//
// A block takes a patch of up to 32 rows x 48 columns and a slice of the pixels, 32 quads (4 pixels in a row) at a
// time through shared memory: a lane reads one quad of its warp's lines, 16 bytes an access where rows are aligned and
// several accesses in flight. Then a thread has a piece of the patch, 8 rows x 4 columns in registers, and every n-th
// quad: so a small patch too keeps most threads busy. On tensor cores (tensor.h) a warp has 16 rows and all columns,
// and every fourth or eighth pair of quads. The slices' sums lie in a workspace [slice][weight] and a second launch
// adds them in a fixed order: no atomics, the same bits on every run.
//
// 2·rows·cols FLOPs per pixel; a line of g is read once per 48 columns, one of x once per 32 rows, mostly from L2. A
// piece's quad is 12 reads of 16 bytes for 128 multiply-adds. Memory bounds it up to some 20 channels (k = 1), which
// is what it aims at, arithmetic and the reads of shared memory beyond; in half precision memory bounds it.
#pragma once

#include "cuda/slices.h"
#include "cuda/tensor.h"

namespace sodfast::cuda {

constexpr int outer_threads = 256, outer_warps = outer_threads / 32, tile_quads = 32;
constexpr int patch_rows = 32, patch_cols = 48, rows_per_thread = 8, cols_per_thread = 4;

// Lines of the quads in shared memory, `pitch` quads apart.
template <class A>
struct Lines {
  Pack<A, 4>* data;
  int pitch;
  __device__ __forceinline__ Pack<A, 4>& at(int line, int quad) const { return data[line * pitch + quad]; }
};

// Four pixels of one sample, from (y, x) to the right; count of them exist, none beyond the last sample.
struct Quad {
  int64_t b;
  int y, x, count;
};

// What a patch covers: pixels of batch x rows x cols, and its products.
struct Patch {
  int64_t batch;
  int rows, cols;      // of the maps
  int n_rows, n_cols;  // of the patch; what lies past them in its lines is never used
};

// n channels in nearly equal parts of at most `most`, all but the last a multiple of `unit`: the size of one, and how
// many there are. Made on the host: 64-bit divisions would keep a block's threads waiting.
struct Parts {
  int size = 1, count = 0;
  Parts() = default;
  Parts(int64_t n, int64_t most, int64_t unit) {
    if (n == 0) return;
    const int64_t units = divide_up(n, unit);
    size = static_cast<int>(divide_up(units, divide_up(units, most / unit)) * unit);
    count = static_cast<int>(divide_up<int64_t>(n, size));
  }
};

// Whether all rows of a map are whole, aligned quads.
template <class T>
bool whole_quads(const void* map, int64_t cols) {
  return cols % 4 == 0 && reinterpret_cast<uintptr_t>(map) % sizeof(Pack<T, 4>) == 0;
}

// The tiles that the pixels of scale s make.
inline int64_t tiles_of(const Pyramid& maps, int s) {
  return divide_up<int64_t>(maps.batch * maps.rows(s) * divide_up<int64_t>(maps.cols(s), 4), tile_quads);
}

// Values x to x + 3 of a row of `cols`, zero outside and from the count-th on. packed: x and the row are aligned, and a
// quad lies inside as a whole or not at all.
template <bool packed, class T>
__device__ __forceinline__ auto read_quad(const T* row, int x, int cols, int count) {
  if constexpr (packed) {
    Words<T, 4> words{};
    if (count > 0 && static_cast<unsigned>(x) < static_cast<unsigned>(cols)) words = words_at<4>(row + x);
    return words;
  } else {
    Pack<T, 4> v{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count && static_cast<unsigned>(x + i) < static_cast<unsigned>(cols)) v.v[i] = row[x + i];
    return v;
  }
}

// Fills this lane's quad of the n lines: read(line) gives four values. Every warp has each eighth line; `at_once` of
// them are read before the first is written, so that their latencies overlap.
template <int at_once, class A, class Read>
__device__ __forceinline__ void fill_lines(int n, Lines<A> lines, const Read& read) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int first = warp; first < n; first += at_once * outer_warps) {
    decltype(read(0)) quads[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u)
      if (first + u * outer_warps < n) quads[u] = read(first + u * outer_warps);
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      if (first + u * outer_warps >= n) break;
      Pack<A, 4> wide;
      widen(pack_of(quads[u]), wide.v);
      lines.at(first + u * outer_warps, lane) = wide;
    }
  }
}

// Fills n lines with the quad of n planes as they are stored, `plane` values apart.
template <class T, class A>
__device__ __forceinline__ void copy_lines(const T* planes, int64_t plane, int n, int cols, const Quad& at, bool packed,
                                           Lines<A> lines) {
  const T* row = planes + static_cast<int64_t>(at.y) * cols;
  if (packed)
    fill_lines<4>(n, lines, [&](int line) { return read_quad<true>(row + line * plane, at.x, cols, at.count); });
  else
    fill_lines<2>(n, lines, [&](int line) { return read_quad<false>(row + line * plane, at.x, cols, at.count); });
}

// A thread's part of the products without tensor cores: piece (r0, c0) has rows r0, r0 + down, … and columns c0, c0 +
// across, …
template <class A>
struct Pieces {
  static constexpr int pitch = tile_quads + 1;  // odd: reads of 16 bytes of neighbouring lines lie in different banks
  int down, across, groups, group, piece;       // groups of threads share the quads
  A sum[rows_per_thread][cols_per_thread] = {};

  __device__ __forceinline__ explicit Pieces(const Patch& patch)
      : down(divide_up(patch.n_rows, rows_per_thread)),
        across(divide_up(patch.n_cols, cols_per_thread)),
        groups(least(tile_quads, outer_threads / (down * across))),
        group(static_cast<int>(threadIdx.x) / (down * across)),
        piece(static_cast<int>(threadIdx.x) % (down * across)) {}

  __device__ __forceinline__ void add(const Lines<A>& row_lines, const Lines<A>& col_lines) {
    if (group >= groups) return;
    const Pack<A, 4>*rows = &row_lines.at(piece / across, 0), *cols = &col_lines.at(piece % across, 0);
#pragma unroll 1
    for (int q = group; q < tile_quads; q += groups) {
      Pack<A, 4> columns[cols_per_thread];
#pragma unroll
      for (int c = 0; c < cols_per_thread; ++c) columns[c] = cols[c * across * pitch + q];
#pragma unroll
      for (int r = 0; r < rows_per_thread; ++r) {
        const Pack<A, 4> row = rows[r * down * pitch + q];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int c = 0; c < cols_per_thread; ++c) sum[r][c] += row.v[i] * columns[c].v[i];
      }
    }
  }

  // Calls out(row, column, the sum of all threads); `shared` has room for what every thread has.
  template <class Out>
  __device__ __forceinline__ void finish(const Patch& patch, A* shared, const Out& out) {
    const int thread = static_cast<int>(threadIdx.x), pieces = down * across;
#pragma unroll
    for (int r = 0; r < rows_per_thread; ++r)
#pragma unroll
      for (int c = 0; c < cols_per_thread; ++c) shared[(r * cols_per_thread + c) * outer_threads + thread] = sum[r][c];
    __syncthreads();
    for (int e = thread; e < patch.n_rows * patch.n_cols; e += outer_threads) {
      const int row = e / patch.n_cols, col = e % patch.n_cols;
      const A* sums =
          shared + (row / down * cols_per_thread + col / across) * outer_threads + row % down * across + col % across;
      A total = 0;
      for (int n = 0; n < groups; ++n) total += sums[n * pieces];
      out(row, col, total);
    }
  }
};

// The same on tensor cores, for maps that are stored as T: a warp has 16 rows and all columns.
template <class T>
struct Tiles {
  static constexpr int pitch = tile_quads + 2;  // reads of 8 bytes of four lines fill all banks once
  static constexpr int across = patch_cols / 8;
  int n_rows, n_cols, sharing;  // warps that share the pixels of 16 rows
  float sum[across][4] = {};

  __device__ __forceinline__ explicit Tiles(const Patch& patch)
      : n_rows(patch.n_rows),
        n_cols(patch.n_cols),
        sharing(patch.n_rows > 16 ? outer_warps / 2 : outer_warps) {}

  // Two pixels of a line.
  static __device__ __forceinline__ Pair<T> pair(const float* lines, int line, int pixel) {
    const auto wide = *reinterpret_cast<const Pack<float, 2>*>(lines + line * (4 * pitch) + pixel);
    return {wide.v[0], wide.v[1]};
  }
  __device__ __forceinline__ void add(const Lines<float>& row_lines, const Lines<float>& col_lines) {
    const float *rows = row_lines.data->v, *cols = col_lines.data->v;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4, t = lane % 4, row = warp / sharing * 16 + g;
#pragma unroll 1
    for (int pixel = warp % sharing * 8; pixel < 4 * tile_quads; pixel += 8 * sharing) {
      const Fragment<T> fragment{pair(rows, row, pixel + 2 * t), pair(rows, row + 8, pixel + 2 * t)};
#pragma unroll
      for (int n = 0; n < across; ++n)
        if (8 * n < n_cols) multiply_add(sum[n], fragment, pair(cols, 8 * n + g, pixel + 2 * t));
    }
  }

  template <class Out>
  __device__ __forceinline__ void finish(const Patch&, float* shared, const Out& out) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
    float* const own = shared + thread / 32 * (16 * patch_cols);  // [warp][row][column]
#pragma unroll
    for (int n = 0; n < across; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) own[(g + i / 2 * 8) * patch_cols + 8 * n + 2 * t + i % 2] = sum[n][i];
    __syncthreads();
    for (int e = thread; e < n_rows * patch_cols; e += outer_threads) {
      const int row = e / patch_cols, col = e % patch_cols;
      if (col >= n_cols) continue;
      const float* sums = shared + (row / 16 * sharing * 16 + row % 16) * patch_cols + col;
      float total = 0;
      for (int w = 0; w < sharing; ++w) total += sums[w * 16 * patch_cols];
      out(row, col, total);
    }
  }
};

// Problem: the type Stored of its maps; `Place place(block)`, and of a place `Patch patch(place)`, `stage(place, quad,
// rows, cols)`, which fills this lane's quad of the patch's lines, zero where pixels do not exist, and `weight(place,
// row, col)`.
template <class Problem, bool tensor_cores>
__global__ void __launch_bounds__(outer_threads, 2)
    outer_product(const __grid_constant__ Problem problem, typename Problem::A* workspace, int64_t weights,
                  int64_t slices) {
  using T = typename Problem::Stored;
  using A = typename Problem::A;
  using Products = std::conditional_t<tensor_cores, Tiles<T>, Pieces<A>>;
  __shared__ Pack<A, 4> lines[(patch_rows + patch_cols) * Products::pitch];
  static_assert(sizeof lines >= rows_per_thread * cols_per_thread * outer_threads * sizeof(A) &&
                    sizeof lines >= 16 * patch_cols * outer_warps * sizeof(A),
                "the sums of all threads fit");
  const Lines<A> row_lines{lines, Products::pitch}, col_lines{&row_lines.at(patch_rows, 0), Products::pitch};
  int64_t slice;
  const int64_t block = divide(blockIdx.x, slices, slice);
  __shared__ typename Problem::Place place;  // shared: in registers it would crowd out the sums
  __shared__ Patch patch;
  if (threadIdx.x == 0) place = problem.place(block), patch = problem.patch(place);
  __syncthreads();
  const int64_t quads_across = divide_up(patch.cols, 4), quads = patch.batch * patch.rows * quads_across;
  const int64_t tiles = divide_up<int64_t>(quads, tile_quads), end = (slice + 1) * tiles / slices;
  Products products(patch);
  for (int64_t tile = slice * tiles / slices; tile < end; ++tile) {
    const int64_t quad = tile * tile_quads + threadIdx.x % 32;
    int64_t x, y;
    Quad at;
    at.b = divide(divide(least(quad, quads - 1), quads_across, x), patch.rows, y);
    at.y = static_cast<int>(y), at.x = static_cast<int>(x) * 4;
    at.count = quad < quads ? least(4, patch.cols - at.x) : 0;
    problem.stage(place, at, row_lines, col_lines);
    __syncthreads();
    products.add(row_lines, col_lines);
    __syncthreads();
  }
  products.finish(patch, reinterpret_cast<A*>(lines), [&](int row, int col, A total) {
    workspace[slice * weights + problem.weight(place, row, col)] = total;
  });
}

// Starts it: `patches` times `slices` blocks.
template <class Problem>
cudaError_t launch_outer_product(const Problem& problem, typename Problem::A* workspace, int64_t patches,
                                 int64_t weights, int64_t slices, cudaStream_t stream) {
  return on_tensor_cores<typename Problem::Stored>([&](auto tensor_cores) {
    return launch(outer_product<Problem, decltype(tensor_cores)::value>, patches * slices, outer_threads, stream,
                  problem, workspace, weights, slices);
  });
}

}  // namespace sodfast::cuda
