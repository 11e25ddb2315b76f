// The heart of every dense convolution here: one output row, all output channels.
//
//   out[o][x] = epilogue( start[o][x] + Σ_t w[t][o] · tap[t][x] ),   epilogue(v) = prelu(v + bias[o], slope[o])
//
// A tap is a pointer into an input row, already shifted by its place in the kernel: k² of them per input channel.
// The channels are cut into near-equal blocks of at most Tile::outs (13 = 7 + 6, never 8 + 5 + padding), the row into
// near-equal tiles of at most Tile::vectors vectors; one tile of one block stays in registers over all taps. Per tap
// it loads V vectors and O weights and does O·V multiply-adds. The weights are packed as [block][tap][channel].
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

template <class T>
struct RowConv {
  const T* const* taps;
  int64_t n_taps;
  const T* weights;  // packed
  int64_t outs, width;
  T* out;
  int64_t out_stride;  // from one output channel to the next
  const T* start;      // null: zero
  int64_t start_stride;
  const T* bias;   // null: zero
  const T* slope;  // null: identity
};

template <class T, int O, int V, bool Masked>
inline void conv_tile(const RowConv<T>& r, const T* w, int64_t o0, int64_t x, int64_t last) {
  using X = Vec<T>;
  constexpr int64_t L = X::lanes;
  X sum[O][V];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const T* p = r.start + (o0 + o) * r.start_stride + x + v * L;
      sum[o][v] = r.start == nullptr ? X(T(0)) : (Masked && v == V - 1) ? X::load(p, last) : X::load(p);
    }
  for (int64_t t = 0; t < r.n_taps; ++t, w += O) {
    const T* p = r.taps[t] + x;
    X in[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) in[v] = (Masked && v == V - 1) ? X::load(p + v * L, last) : X::load(p + v * L);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const X wo(w[o]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[o][v] = fma(wo, in[v], sum[o][v]);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    const X bias(r.bias == nullptr ? T(0) : r.bias[o0 + o]);
    const X slope(r.slope == nullptr ? T(1) : r.slope[o0 + o]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* p = r.out + (o0 + o) * r.out_stride + x + v * L;
      const X y = prelu(sum[o][v] + bias, slope);
      (Masked && v == V - 1) ? y.store(p, last) : y.store(p);
    }
  }
}

// V from `vectors` at run time, O known: only the row's last tile may be masked.
template <class T, int O, int V>
inline void conv_block(const RowConv<T>& r, const T* w, int64_t o0, int64_t x, int vectors, int64_t last) {
  if constexpr (V > 1) {
    if (vectors < V) return conv_block<T, O, V - 1>(r, w, o0, x, vectors, last);
  }
  last == Vec<T>::lanes ? conv_tile<T, O, V, false>(r, w, o0, x, last) : conv_tile<T, O, V, true>(r, w, o0, x, last);
}

template <class T, int O>
inline void conv_outs(const RowConv<T>& r, const T* w, int64_t o0, int outs, int64_t x, int vectors, int64_t last) {
  if constexpr (O > 1) {
    if (outs < O) return conv_outs<T, O - 1>(r, w, o0, outs, x, vectors, last);
  }
  conv_block<T, O, Tile::vectors(O)>(r, w, o0, x, vectors, last);
}

template <class T>
void conv_row(const RowConv<T>& r) {
  constexpr int64_t L = Vec<T>::lanes;
  const Blocks blocks(r.outs, Tile::outs);
  if (blocks.count == 0) return;
  const int64_t all = (r.width + L - 1) / L;
  const int most = Tile::vectors(static_cast<int>((r.outs + blocks.count - 1) / blocks.count));
  const Blocks tiles(all, most);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t x = tiles.begin(i) * L;
    const int vectors = static_cast<int>(tiles.begin(i + 1) - tiles.begin(i));
    const int64_t last = i + 1 == tiles.count ? r.width - (all - 1) * L : L;
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t o0 = blocks.begin(b);
      conv_outs<T, Tile::outs>(r, r.weights + o0 * r.n_taps, o0, static_cast<int>(blocks.begin(b + 1) - o0), x, vectors,
                               last);
    }
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
