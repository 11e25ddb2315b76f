// The row kernels of conv_rows.h: their tiles for every number of channels and vectors. A source of its own, as they
// take the compiler long and several kernels use them.
#include "cpu/conv_rows.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// Weights are read once and in order, but a deep layer's are a megabyte, which L2 does not keep, and the hardware stops
// to fetch them ahead at every page's end. So they are fetched a page ahead.
constexpr int64_t weights_ahead = 1024;

enum class Edge { none, masked, zeroed, cut };

template <class T, int O, int V, Edge E>
inline void conv_tile(const RowConv<T>& r, const T* w, int64_t o0, const Place* at) {
  using X = Vec<T>;
  X sum[O][V];
  const auto read = [&](const T* p, int v) { return E == Edge::masked ? load(p, at[v].lanes) : X::load(p); };
  const auto write = [&](X y, T* p, int v) {
    if constexpr (E == Edge::masked || E == Edge::cut) {
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
    __builtin_prefetch(w + weights_ahead);
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
  if (r.activation != Activation::none) {
    const auto activate = [&](const auto& f) {
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[o][v] = f(sum[o][v]);
    };
    if (r.activation == Activation::relu) activate([](X x) { return relu(x); });
    if (r.activation == Activation::relu6) activate([](X x) { return relu6(x); });
    if (r.activation == Activation::hardswish) activate([](X x) { return hardswish(x); });
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
  if (r.ends == Ends::zeroed) return conv_tile<T, O, V, Edge::zeroed>(r, w, o0, at);
  r.ends == Ends::cut ? conv_tile<T, O, V, Edge::cut>(r, w, o0, at) : conv_tile<T, O, V, Edge::masked>(r, w, o0, at);
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

}  // namespace

template <class T>
void conv_vectors(const RowConv<T>& r, const Place* places, int64_t n) {
  if (r.outs == 0 || n == 0) return;
  const Blocks tiles(n, vectors_per_tile(r.outs));
  for (int64_t i = 0; i < tiles.count; ++i) {
    if (r.prefetch && i + 1 < tiles.count)
      for (int64_t t = 0; t < r.n_taps; ++t)
        for (int64_t v = tiles.begin(i + 1); v < tiles.begin(i + 2); ++v) __builtin_prefetch(r.taps[t] + places[v].in);
    conv_places(r, places + tiles.begin(i), static_cast<int>(tiles.begin(i + 1) - tiles.begin(i)));
  }
}

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

template <class T>
void grad_rows(const RowsGrad<T>& r) {
  const Blocks outs(r.n_outs, Tile::grad_outs), taps(r.n_taps, Tile::grad_taps);
  for (int64_t i = 0; i < taps.count; ++i)
    for (int64_t b = 0; b < outs.count; ++b)
      grad_block<T, Tile::grad_outs, Tile::grad_taps>(
          r, outs.begin(b), static_cast<int>(outs.begin(b + 1) - outs.begin(b)), taps.begin(i),
          static_cast<int>(taps.begin(i + 1) - taps.begin(i)));
}

#define SODFAST_ROWS(T)                                                    \
  template void conv_vectors<T>(const RowConv<T>&, const Place*, int64_t); \
  template void conv_row<T>(const RowConv<T>&, int64_t);                   \
  template void grad_rows<T>(const RowsGrad<T>&);

SODFAST_ROWS(float)
#ifdef SODFAST_BASELINE
SODFAST_ROWS(double)
#endif

}  // namespace SODFAST_ISA
}  // namespace sodfast
