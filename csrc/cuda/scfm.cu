// The fusion of SCFNet's SCFM, and its gradients, without the upsampled map in memory.
//
//   out = x + x up(y)   or   x + up(y)          up: bilinear to the size of x, align_corners=False
//   position d of x lies at ((2 d + 1) n - N) / 2N of y          n positions of y, N of x
//
// Places are exact: whole numbers are divided, and the rest is the weight.
//
// Forward: a thread has 16 bytes (one number where they are not aligned) of each of four rows of x, all asked for at
// once. Walking along them it keeps the two columns of y that it is between, blended down. Bytes: x, y and the result
// once; 3 FLOPs per number and 4 per column of y: memory bounds it.
//
// Channels last a thread has 16 bytes of channels at four positions of a row, and does the same.
//
// Backward: gx = g + g up(y). gy = up's transpose of g x: a block has a tile of gy and goes through the part of x
// that lies above it, in pieces: products into shared memory (and gx into memory on the way), sums along the rows,
// sums down the columns, all in the order of positions. Bytes: g, x, y, gx and gy once, but that blocks share the
// border of their tiles, which L2 has; some 15 FLOPs per number of x: memory bounds it too. Channels last a thread has
// 16 bytes of channels of one position of gy and goes through every fourth row of what lies around it in x, all in all
// four times as much as there is, most of it from the caches. gx is written by whoever is the first of the positions of
// y that one lies between.
#include "cuda/scfm_axis.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = 256;

// Two rows of y blended into one.
template <class T>
struct Blended {
  using A = typename Sum<T>::type;
  const T *above, *under;
  A part;
  int last;
  __device__ __forceinline__ Blended(const T* y, const Axis& down, const Axis& along, const Place<A>& place,
                                     A per_rest) {
    above = y + static_cast<int64_t>(place.first()) * along.small;
    under = y + static_cast<int64_t>(least(place.first() + 1, down.small - 1)) * along.small;
    part = place.part(per_rest), last = along.small - 1;
  }
  __device__ __forceinline__ A at(int c) const {
    c = least(c, last);
    return (1 - part) * widen(above[c]) + part * widen(under[c]);
  }
};

template <class T>
struct Arguments {
  Axis down, along;
  int64_t planes;  // or images, whose pixels are `channels` numbers
  int64_t channels;
  const T *g, *x, *y;
  T *out, *gy;  // out: the result, or gx; null: there is none
  bool multiply;
};

// ------------------------------------------------------------------------------------------- forward
constexpr int strip = 4;  // rows of a thread

template <class T, int n>
__global__ void __launch_bounds__(threads) fuse(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  int64_t pack, part;
  const int64_t rest =
      divide(static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x, divide_up(a.along.large, n), pack);
  const int64_t plane = divide(rest, divide_up(a.down.large, strip), part);
  if (plane >= a.planes) return;
  const int r0 = static_cast<int>(part) * strip, c0 = static_cast<int>(pack) * n;
  const int64_t start = (plane * a.down.large + r0) * a.along.large + c0;
  Pack<T, n> values[strip];
#pragma unroll
  for (int i = 0; i < strip; ++i)
    if (r0 + i < a.down.large)
      values[i] = *reinterpret_cast<const Pack<T, n>*>(a.x + start + static_cast<int64_t>(i) * a.along.large);
  const A per_row = A(0.5) / A(a.down.large), per_col = A(0.5) / A(a.along.large);
  const T* y = a.y + plane * a.down.small * a.along.small;
  const Place<A> first(a.along, c0);
  Place<A> down(a.down, r0);
#pragma unroll
  for (int i = 0; i < strip; ++i, down.next(a.down)) {
    if (r0 + i >= a.down.large) break;
    const Blended<T> row(y, a.down, a.along, down, per_row);
    Place<A> place = first;
    int at = place.first();
    A here = row.at(at), after = row.at(at + 1);
#pragma unroll
    for (int j = 0; j < n; ++j, place.next(a.along)) {
      if (place.first() != at) {
        here = place.first() == at + 1 ? after : row.at(place.first());
        at = place.first(), after = row.at(at + 1);
      }
      const A weight = place.part(per_col), up = (1 - weight) * here + weight * after, v = widen(values[i].v[j]);
      narrow(a.multiply ? v + v * up : v + up, values[i].v[j]);
    }
    *reinterpret_cast<Pack<T, n>*>(a.out + start + static_cast<int64_t>(i) * a.along.large) = values[i];
  }
}

template <class T, int n>
struct Pixels {
  using A = typename Sum<T>::type;
  // Two packs of channels weighed into one.
  static __device__ __forceinline__ void mix(const Pack<A, n>& first, const Pack<A, n>& second, A part,
                                             Pack<A, n>& out) {
#pragma unroll
    for (int j = 0; j < n; ++j) out.v[j] = (1 - part) * first.v[j] + part * second.v[j];
  }
  static __device__ __forceinline__ Pack<A, n> read(const T* p) {
    const Pack<T, n> stored = *reinterpret_cast<const Pack<T, n>*>(p);
    Pack<A, n> out;
#pragma unroll
    for (int j = 0; j < n; ++j) out.v[j] = widen(stored.v[j]);
    return out;
  }
};

// Channels last.
template <class T, int n>
__global__ void __launch_bounds__(threads) fuse_pixels(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  using P = Pixels<T, n>;
  int64_t pack, part, r;
  int64_t rest = divide(static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x, a.channels / n, pack);
  rest = divide(rest, divide_up(a.along.large, strip), part);
  const int64_t image = divide(rest, a.down.large, r);
  if (image >= a.planes) return;
  const int c0 = static_cast<int>(part) * strip;
  const int64_t start = (rest * a.along.large + c0) * a.channels + pack * n;
  Pack<T, n> values[strip];
#pragma unroll
  for (int i = 0; i < strip; ++i)
    if (c0 + i < a.along.large) values[i] = *reinterpret_cast<const Pack<T, n>*>(a.x + start + i * a.channels);
  const Place<A> down(a.down, static_cast<int>(r));
  const A down_part = down.part(A(0.5) / A(a.down.large)), per_col = A(0.5) / A(a.along.large);
  const T* y = a.y + image * a.down.small * a.along.small * a.channels + pack * n;
  const T *above = y + int64_t(down.first()) * a.along.small * a.channels,
          *under = y + int64_t(least(down.first() + 1, a.down.small - 1)) * a.along.small * a.channels;
  const auto blended = [&](int c, Pack<A, n>& out) {
    const int64_t at = least(c, a.along.small - 1) * a.channels;
    P::mix(P::read(above + at), P::read(under + at), down_part, out);
  };
  Place<A> place(a.along, c0);
  int at = place.first();
  Pack<A, n> here, after, up;
  blended(at, here), blended(at + 1, after);
#pragma unroll
  for (int i = 0; i < strip; ++i, place.next(a.along)) {
    if (c0 + i >= a.along.large) break;
    if (place.first() != at) {
      if (place.first() == at + 1)
        here = after;
      else
        blended(place.first(), here);
      at = place.first(), blended(at + 1, after);
    }
    P::mix(here, after, place.part(per_col), up);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A v = widen(values[i].v[j]);
      narrow(a.multiply ? v + v * up.v[j] : v + up.v[j], values[i].v[j]);
    }
    *reinterpret_cast<Pack<T, n>*>(a.out + start + i * a.channels) = values[i];
  }
}

// ------------------------------------------------------------------------------------------ backward
constexpr int tile_cols = 32, tile_rows = threads / tile_cols;  // of gy: one thread each
constexpr int piece_cols = 128, piece_rows = threads / 32;      // of x: a warp has a row

template <class A>
struct Shared {
  A products[piece_rows][piece_cols + piece_cols / 32];  // skewed: threads read them several columns apart
  A lines[piece_rows][tile_cols];                        // summed along the row
  A col_part[piece_cols], row_part[piece_rows];
  int col_first[piece_cols], row_first[piece_rows];
  static __device__ __forceinline__ int skew(int c) { return c + c / 32; }
};

template <class T>
__global__ void __launch_bounds__(threads, 3) fuse_backward(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ Shared<A> shared;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t part;
  int64_t rest = divide(blockIdx.x, divide_up(a.along.small, tile_cols), part);
  const int c0 = static_cast<int>(part) * tile_cols, c = c0 + lane;
  const int64_t plane = divide(rest, divide_up(a.down.small, tile_rows), part);
  const int r0 = static_cast<int>(part) * tile_rows, r = r0 + warp;
  const int64_t large = plane * a.down.large * a.along.large, small = plane * a.down.small * a.along.small;
  const A per_row = A(0.5) / A(a.down.large), per_col = A(0.5) / A(a.along.large);
  // Above the tile: all positions between its first coarse one, less one, and its last.
  const int row_begin = a.down.first_at(r0 - 1), row_end = a.down.first_at(r0 + tile_rows);
  const int col_begin = a.along.first_at(c0 - 1), col_end = a.along.first_at(c0 + tile_cols);
  const int my_rows[2] = {a.down.first_at(r - 1), a.down.first_at(r + 1)};
  const int my_cols[2] = {a.along.first_at(c - 1), a.along.first_at(c + 1)};
  A sum = 0;
  for (int top = row_begin; top < row_end; top += piece_rows)
    for (int left = col_begin; left < col_end; left += piece_cols) {
      const int rows = least(piece_rows, row_end - top), cols = least(piece_cols, col_end - left);
      if (thread < cols) {
        const Place<A> place(a.along, left + thread);
        shared.col_first[thread] = place.first(), shared.col_part[thread] = place.part(per_col);
      }
      if (thread >= threads - 32 && lane < rows) {
        const Place<A> place(a.down, top + lane);
        shared.row_first[lane] = place.first(), shared.row_part[lane] = place.part(per_row);
      }
      __syncthreads();
      if (warp < rows) {
        const int64_t start = large + static_cast<int64_t>(top + warp) * a.along.large + left;
        const Blended<T> row(a.y + small, a.down, a.along, Place<A>(a.down, top + warp), per_row);
        const bool my_row = a.out != nullptr && shared.row_first[warp] >= r0;
        for (int i = lane; i < cols; i += 32) {
          const A g = widen(a.g[start + i]);
          shared.products[warp][shared.skew(i)] = a.multiply ? g * widen(a.x[start + i]) : g;
          const int first = shared.col_first[i];
          if (my_row && first >= c0) {
            const A p = shared.col_part[i], up = (1 - p) * row.at(first) + p * row.at(first + 1);
            narrow(g + g * up, a.out[start + i]);
          }
        }
      }
      __syncthreads();
      if (warp < rows) {
        A line = 0;
        const int from = my_cols[0] > left ? my_cols[0] - left : 0, to = least(my_cols[1] - left, cols);
        for (int i = from; i < to; ++i)
          line += weight_of(shared.col_first[i], shared.col_part[i], c, a.along.small - 1) *
                  shared.products[warp][shared.skew(i)];
        shared.lines[warp][lane] = line;
      }
      __syncthreads();
      const int from = my_rows[0] > top ? my_rows[0] - top : 0, to = least(my_rows[1] - top, rows);
      for (int i = from; i < to; ++i)
        sum += weight_of(shared.row_first[i], shared.row_part[i], r, a.down.small - 1) * shared.lines[i][lane];
      __syncthreads();
    }
  if (r < a.down.small && c < a.along.small) narrow(sum, a.gy[small + static_cast<int64_t>(r) * a.along.small + c]);
}

// Channels last: four warps share the rows that 32 packs of gy get something from.
constexpr int row_warps = 4;

template <class T, int n>
__global__ void __launch_bounds__(32 * row_warps) fuse_pixels_backward(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  using P = Pixels<T, n>;
  __shared__ A sums[row_warps][n][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int64_t pack, part_c, part_r;
  int64_t rest = divide(static_cast<int64_t>(blockIdx.x) * 32 + lane, a.channels / n, pack);
  const int64_t target = rest;  // the position of gy
  rest = divide(rest, a.along.small, part_c);
  const int64_t image = divide(rest, a.down.small, part_r);
  const int c = static_cast<int>(part_c), r = static_cast<int>(part_r);
  const int last_r = a.down.small - 1, last_c = a.along.small - 1;
  const A per_row = A(0.5) / A(a.down.large), per_col = A(0.5) / A(a.along.large);
  Pack<A, n> sum{};
  if (image < a.planes) {
    const T* y = a.y + image * a.down.small * a.along.small * a.channels + pack * n;
    const auto corner = [&](int i, int j) { return P::read(y + (int64_t(i) * a.along.small + j) * a.channels); };
    Pack<A, n> corners[2][2] = {};  // of what this position is the first
    if (a.out != nullptr)
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) corners[i][j] = corner(least(r + i, last_r), least(c + j, last_c));
    const int row_end = a.down.first_at(r + 1), col_begin = a.along.first_at(c - 1), col_end = a.along.first_at(c + 1);
    const Place<A> first_col(a.along, col_begin);
    for (int d = a.down.first_at(r - 1) + warp; d < row_end; d += row_warps) {
      const Place<A> down(a.down, d);
      const A row_part = down.part(per_row), row_weight = weight_of(down.first(), row_part, r, last_r);
      Pack<A, n> left{}, right{};  // y in this row, where it is this position's
      if (a.out != nullptr && down.first() == r)
        P::mix(corners[0][0], corners[1][0], row_part, left), P::mix(corners[0][1], corners[1][1], row_part, right);
      Place<A> along = first_col;
      for (int e = col_begin; e < col_end; ++e, along.next(a.along)) {
        const int64_t at = ((image * a.down.large + d) * a.along.large + e) * a.channels + pack * n;
        const Pack<A, n> g = P::read(a.g + at);
        const A col_part = along.part(per_col), weight = row_weight * weight_of(along.first(), col_part, c, last_c);
        if (!a.multiply) {
#pragma unroll
          for (int j = 0; j < n; ++j) sum.v[j] += weight * g.v[j];
          continue;
        }
        const Pack<A, n> x = P::read(a.x + at);
#pragma unroll
        for (int j = 0; j < n; ++j) sum.v[j] += weight * (g.v[j] * x.v[j]);
        if (down.first() != r || along.first() != c) continue;
        Pack<A, n> up;
        P::mix(left, right, col_part, up);
        Pack<T, n> gx;
#pragma unroll
        for (int j = 0; j < n; ++j) narrow(g.v[j] + g.v[j] * up.v[j], gx.v[j]);
        *reinterpret_cast<Pack<T, n>*>(a.out + at) = gx;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < n; ++j) sums[warp][j][lane] = sum.v[j];
  __syncthreads();
  if (warp > 0 || image >= a.planes) return;
  Pack<T, n> gy;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    A total = sums[0][j][lane];
    for (int w = 1; w < row_warps; ++w) total += sums[w][j][lane];
    narrow(total, gy.v[j]);
  }
  *reinterpret_cast<Pack<T, n>*>(a.gy + target * a.channels + pack * n) = gy;
}

template <class T>
Arguments<T> arguments_of(const ScfmShape& shape, const void* x, const void* y, void* out) {
  Arguments<T> a{};
  a.down = axis_of(shape.rows, shape.from_rows), a.along = axis_of(shape.cols, shape.from_cols);
  a.planes = shape.maps, a.channels = shape.channels, a.multiply = shape.multiply;
  a.x = static_cast<const T*>(x), a.y = static_cast<const T*>(y), a.out = static_cast<T*>(out);
  return a;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

cudaError_t scfm(Type type, const ScfmShape& shape, const void* x, const void* y, void* out, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int n = 16 / sizeof(T);
    if (shape.channels > 1) {
      const bool packed = shape.channels % n == 0 && is_aligned(x) && is_aligned(y) && is_aligned(out);
      const int64_t work = shape.maps * shape.rows * divide_up<int64_t>(shape.cols, strip) *
                           (packed ? shape.channels / n : shape.channels);
      return launch(packed ? fuse_pixels<T, n> : fuse_pixels<T, 1>, divide_up<int64_t>(work, threads), threads, stream,
                    arguments_of<T>(shape, x, y, out));
    }
    const bool packed = shape.cols % n == 0 && is_aligned(x) && is_aligned(out);
    const int64_t work = shape.maps * divide_up<int64_t>(shape.rows, strip) * (packed ? shape.cols / n : shape.cols);
    return launch(packed ? fuse<T, n> : fuse<T, 1>, divide_up<int64_t>(work, threads), threads, stream,
                  arguments_of<T>(shape, x, y, out));
  });
}

cudaError_t scfm_backward(Type type, const ScfmShape& shape, const void* g, const void* x, const void* y, void* gx,
                          void* gy, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(shape, x, y, shape.multiply ? gx : nullptr);
    a.g = static_cast<const T*>(g), a.gy = static_cast<T*>(gy);
    if (shape.channels > 1) {
      constexpr int n = 16 / sizeof(T);
      const bool packed = shape.channels % n == 0 && is_aligned(g) && is_aligned(x) && is_aligned(y) &&
                          is_aligned(gy) && is_aligned(gx);
      const int64_t work =
          shape.maps * shape.from_rows * shape.from_cols * (packed ? shape.channels / n : shape.channels);
      return launch(packed ? fuse_pixels_backward<T, n> : fuse_pixels_backward<T, 1>, divide_up<int64_t>(work, 32),
                    32 * row_warps, stream, a);
    }
    const int64_t blocks =
        shape.maps * divide_up<int64_t>(shape.from_rows, tile_rows) * divide_up<int64_t>(shape.from_cols, tile_cols);
    return launch(fuse_backward<T>, blocks, threads, stream, a);
  });
}

}  // namespace sodfast::cuda
