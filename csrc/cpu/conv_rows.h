// The heart of every dense convolution here: all output channels of some vectors.
//
//   out[o][x] = epilogue( start[o][x] + Σ_t w[t][o] · tap[t][x] ),   epilogue(v) = prelu(v + bias[o], slope[o])
//                                                                       or activation(v + bias[o])
//
// A tap is a pointer into an input row, already shifted by its place in the kernel: k² of them per input channel.
// The channels are cut into near-equal blocks of at most Tile::outs (13 = 7 + 6, never 8 + 5 + padding), the vectors
// into near-equal tiles of at most Tile::vectors; one tile of one block stays in registers over all taps. Per tap it
// loads V vectors and O weights and does O·V multiply-adds. The weights are packed as [block][tap][channel].
#pragma once

#include "common/shapes.h"
#include "common/simd.h"

#ifndef SODFAST_ISA
#error "for kernel sources, see table.h"
#endif

namespace sodfast {
namespace SODFAST_ISA {

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

// How a vector is treated that only its first lanes count of.
enum class Ends {
  exact,   // only they are read and written
  zeroed,  // behind a row there is room in both maps: all are read, zeros written behind those that count
  cut,     // there is room in the input alone: all are read, those that count written
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
  const T* bias;   // null: zero
  const T* slope;  // null: identity
  Ends ends = Ends::exact;
  bool prefetch = false;    // the taps are rows far apart, in memory: fetch those of the next tile ahead
  const T* head = nullptr;  // then Σ_o head[o] · out[o] is added to the one channel `out`
  Activation activation = Activation::none;  // instead of slope
};

// The vectors at `places`, all output channels.
template <class T>
void conv_vectors(const RowConv<T>& r, const Place* places, int64_t n);

// One row of `width` elements, read and written at the same columns.
template <class T>
void conv_row(const RowConv<T>& r, int64_t width);

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

template <class T>
void grad_rows(const RowsGrad<T>& r);

}  // namespace SODFAST_ISA
}  // namespace sodfast
