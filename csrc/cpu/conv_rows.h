// The heart of every dense convolution here: all output channels of some vectors.
//
//   out[o][x] = epilogue( start[o][x] + Σ_t w[t][o] · tap[t][x] ),   epilogue(v) = prelu(v + bias[o], slope[o])
//
// A tap is a pointer into an input row, already shifted by its place in the kernel: k² of them per input channel.
// The channels are cut into near-equal blocks of at most Tile::outs (13 = 7 + 6, never 8 + 5 + padding), the vectors
// into near-equal tiles of at most Tile::vectors; one tile of one block stays in registers over all taps. Per tap it
// loads V vectors and O weights and does O·V multiply-adds. The weights are packed as [block][tap][channel].
#pragma once

#include "common/simd.h"

namespace sodfast {
namespace {

struct Blocks {  // [0, n) in near-equal blocks of at most `most`
  int64_t n, count;
  Blocks(int64_t items, int64_t most) : n(items), count((items + most - 1) / most) {}
  int64_t begin(int64_t b) const { return b * n / count; }
};

// dst = weight(o, t) for o < outs, t < taps, in the order above.
template <class T, class F>
void pack_weights(int64_t outs, int64_t taps, T* dst, const F& weight) {
  const Blocks blocks(outs, Tile::outs);
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t o = blocks.begin(b); o < blocks.begin(b + 1); ++o) *dst++ = weight(o, t);
}

// Where a vector is read, relative to the taps, and written, relative to the output; only `lanes` of it count.
struct Place {
  int64_t in, out, lanes;
};

template <class T>
struct RowConv {
  const T* const* taps;
  int64_t n_taps;
  const T* weights;  // packed
  int64_t outs;
  T* out;
  int64_t out_stride;  // from one output channel to the next
  const T* start;      // null: zero
  int64_t start_stride;
  const T* bias;            // null: zero
  const T* slope;           // null: identity
  bool padded = false;      // behind a row there is room: whole vectors are read, the lanes beyond it written as zeros
  const T* head = nullptr;  // then Σ_o head[o] · out[o] is added to the one channel `out`
};

enum class Edge { none, masked, zeroed };

template <class T, int O, int V, Edge E>
inline void conv_tile(const RowConv<T>& r, const T* w, int64_t o0, const Place* at) {
  using X = Vec<T>;
  X sum[O][V];
  const auto read = [&](const T* p, int v) { return E == Edge::masked ? load(p, at[v].lanes) : X::load(p); };
  const auto write = [&](X y, T* p, int v) {
    if constexpr (E == Edge::masked) {
      store(y, p, at[v].lanes);
    } else {
      (E == Edge::zeroed ? keep(y, at[v].lanes) : y).store(p);
    }
  };
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    const X bias(r.bias == nullptr ? T(0) : r.bias[o0 + o]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[o][v] = bias;
  }
  if (r.start != nullptr) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[o][v] = sum[o][v] + read(r.start + (o0 + o) * r.start_stride + at[v].out, v);
  }
  int64_t offset[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) offset[v] = at[v].in;
  const T* const* tap = r.taps;
  for (int64_t t = r.n_taps; t > 0; --t, ++tap, w += O) {
    const T* p = *tap;
    X in[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) in[v] = read(p + offset[v], v);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const X wo(w[o]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[o][v] = fma(wo, in[v], sum[o][v]);
    }
  }
  if (r.slope != nullptr) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const X slope(r.slope[o0 + o]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[o][v] = prelu(sum[o][v], slope);
    }
  }
  if (r.head != nullptr) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* p = r.out + at[v].out;
      X y = read(p, v);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) y = fma(X(r.head[o0 + o]), sum[o][v], y);
      write(y, p, v);
    }
    return;
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) write(sum[o][v], r.out + (o0 + o) * r.out_stride + at[v].out, v);
}

// O and V from run time to compile time.
template <class T, int O, int V>
inline void conv_block(const RowConv<T>& r, const T* w, int64_t o0, const Place* at, int vectors, bool whole) {
  if constexpr (V > 1) {
    if (vectors < V) return conv_block<T, O, V - 1>(r, w, o0, at, vectors, whole);
  }
  if (whole) return conv_tile<T, O, V, Edge::none>(r, w, o0, at);
  r.padded ? conv_tile<T, O, V, Edge::zeroed>(r, w, o0, at) : conv_tile<T, O, V, Edge::masked>(r, w, o0, at);
}

template <class T, int O>
inline void conv_outs(const RowConv<T>& r, const T* w, int64_t o0, int outs, const Place* at, int vectors, bool whole) {
  if constexpr (O > 1) {
    if (outs < O) return conv_outs<T, O - 1>(r, w, o0, outs, at, vectors, whole);
  }
  conv_block<T, O, Tile::vectors(O)>(r, w, o0, at, vectors, whole);
}

inline int vectors_per_tile(int64_t outs) {
  const Blocks blocks(outs, Tile::outs);
  return Tile::vectors(static_cast<int>((outs + blocks.count - 1) / blocks.count));
}

template <class T>
inline void conv_places(const RowConv<T>& r, const Place* at, int vectors) {
  const Blocks blocks(r.outs, Tile::outs);
  bool whole = true;
  for (int v = 0; v < vectors; ++v) whole = whole && at[v].lanes == Vec<T>::lanes;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t o0 = blocks.begin(b);
    conv_outs<T, Tile::outs>(r, r.weights + o0 * r.n_taps, o0, static_cast<int>(blocks.begin(b + 1) - o0), at, vectors,
                             whole);
  }
}

// The vectors at `places`, all output channels.
template <class T>
void conv_vectors(const RowConv<T>& r, const Place* places, int64_t n) {
  if (r.outs == 0 || n == 0) return;
  const Blocks tiles(n, vectors_per_tile(r.outs));
  for (int64_t i = 0; i < tiles.count; ++i)
    conv_places(r, places + tiles.begin(i), static_cast<int>(tiles.begin(i + 1) - tiles.begin(i)));
}

// One row of `width` elements, read and written at the same columns.
template <class T>
void conv_row(const RowConv<T>& r, int64_t width) {
  constexpr int64_t L = Vec<T>::lanes;
  if (r.outs == 0) return;
  const int64_t all = (width + L - 1) / L;
  const Blocks tiles(all, vectors_per_tile(r.outs));
  for (int64_t i = 0; i < tiles.count; ++i) {
    Place at[8];
    const int vectors = static_cast<int>(tiles.begin(i + 1) - tiles.begin(i));
    for (int v = 0; v < vectors; ++v) {
      const int64_t x = (tiles.begin(i) + v) * L;
      at[v] = {x, x, width - x < L ? width - x : L};
    }
    conv_places(r, at, vectors);
  }
}

// ------------------------------------------------------------------------------------------- weight gradient
//   grad[o][t] += Σ_y Σ_x g[o][y][x] · tap[t][y][x]
// over `rows` rows; a block of channels times a block of taps stays in registers over all of them.
template <class T>
struct RowsGrad {
  const T* const* outs;  // [n_outs] first row of each output channel's gradient
  const T* const* taps;  // [n_taps]
  int64_t n_outs, n_taps, out_pitch, tap_pitch, rows, width;
  T* grad;
  int64_t grad_stride;  // from one output channel to the next
};

template <class T, int O, int K>
inline void grad_tile(const RowsGrad<T>& r, int64_t o0, int64_t t0) {
  using X = Vec<T>;
  X sums[O][K];
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 6
    for (int k = 0; k < K; ++k) sums[o][k] = X(T(0));
  for (int64_t y = 0; y < r.rows; ++y) {
    for_each_vector<T>(r.width, [&](int64_t x, int64_t count) {
      X g[O];
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) g[o] = load(r.outs[o0 + o] + y * r.out_pitch + x, count);
#pragma GCC unroll 6
      for (int k = 0; k < K; ++k) {
        const X in = load(r.taps[t0 + k] + y * r.tap_pitch + x, count);
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) sums[o][k] = fma(g[o], in, sums[o][k]);
      }
    });
  }
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 6
    for (int k = 0; k < K; ++k) r.grad[(o0 + o) * r.grad_stride + t0 + k] += sum(sums[o][k]);
}

template <class T, int O, int K>
inline void grad_block(const RowsGrad<T>& r, int64_t o0, int outs, int64_t t0, int taps) {
  if constexpr (O > 1) {
    if (outs < O) return grad_block<T, O - 1, K>(r, o0, outs, t0, taps);
  }
  if constexpr (K > 1) {
    if (taps < K) return grad_block<T, O, K - 1>(r, o0, outs, t0, taps);
  }
  grad_tile<T, O, K>(r, o0, t0);
}

template <class T>
void grad_rows(const RowsGrad<T>& r) {
  const Blocks outs(r.n_outs, Tile::grad_outs), taps(r.n_taps, Tile::grad_taps);
  for (int64_t i = 0; i < taps.count; ++i)
    for (int64_t b = 0; b < outs.count; ++b)
      grad_block<T, Tile::grad_outs, Tile::grad_taps>(
          r, outs.begin(b), static_cast<int>(outs.begin(b + 1) - outs.begin(b)), taps.begin(i),
          static_cast<int>(taps.begin(i + 1) - taps.begin(i)));
}

}  // namespace
}  // namespace sodfast
