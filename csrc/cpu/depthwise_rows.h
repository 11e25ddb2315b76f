// Depthwise 3×3 of neighbouring rows of one channel.
//
//   out[y][x] = prelu( bias + Σ_{ky,kx} w[ky][kx] · in[y + ky][x + kx - 1], slope )
//
// The row kernel reads each input row once for all the output rows that it serves: nine weights, an accumulator per
// row and three shifted inputs stay in registers. Per vector of an output row, with R rows at a time, that is nine
// multiply-adds and 3 (R + 2) / R loads.
#pragma once

#include "common/simd.h"

namespace sodfast {
namespace {

// What is written behind a row: zeros, where there is room for whole vectors, or nothing.
enum class Tail { zeros, exact };

// Rows are `pitch` items apart; in[y][-1] and in[y][cols] are zeros, and whole vectors can be read.
template <class T>
struct DepthwiseRows {
  const T* in;  // the row above the first output row
  int64_t pitch, cols;
  const T* weight;  // [3, 3]
  T bias, slope;
  T* out;
  int64_t out_pitch;
};

template <class T, int R, bool Whole, Tail Behind>
inline void depthwise_vector(const T* in, int64_t pitch, const Vec<T>* w, Vec<T> bias, Vec<T> slope, T* out,
                             int64_t out_pitch, int64_t lanes) {
  using X = Vec<T>;
  X sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = bias;
#pragma GCC unroll 8
  for (int i = 0; i < R + 2; ++i) {
    const T* p = in + i * pitch;
    X left = X::load(p - 1), here = X::load(p), right = X::load(p + 1);
    pin(left), pin(here), pin(right);
#pragma GCC unroll 8
    for (int ky = 0; ky < 3; ++ky) {
      const int r = i - ky;
      if (r < 0 || r >= R) continue;
      sum[r] = fma(w[3 * ky], left, sum[r]);
      sum[r] = fma(w[3 * ky + 1], here, sum[r]);
      sum[r] = fma(w[3 * ky + 2], right, sum[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const X y = prelu(sum[r], slope);
    if (!Whole && Behind == Tail::exact)
      y.store(out + r * out_pitch, lanes);
    else
      (Whole ? y : keep(y, lanes)).store(out + r * out_pitch);
  }
}

template <class T, int R, Tail Behind>
inline void depthwise_block(const DepthwiseRows<T>& d, const Vec<T>* w, int64_t y) {
  constexpr int64_t L = Vec<T>::lanes;
  const Vec<T> bias(d.bias), slope(d.slope);
  const int64_t cols = d.cols, pitch = d.pitch, out_pitch = d.out_pitch;
  const T* in = d.in + y * pitch;
  T* out = d.out + y * out_pitch;
  int64_t x = 0;
  for (; x + L <= cols; x += L)
    depthwise_vector<T, R, true, Behind>(in + x, pitch, w, bias, slope, out + x, out_pitch, L);
  if (x < cols)
    depthwise_vector<T, R, false, Behind>(in + x, pitch, w, bias, slope, out + x, out_pitch, cols - x);
  else if (Behind == Tail::zeros)
    for (int r = 0; r < R; ++r) Vec<T>(T(0)).store(out + r * out_pitch + x);
}

template <class T, Tail Behind>
void depthwise_rows(const DepthwiseRows<T>& d, int64_t rows) {
  constexpr int R = Tile::rows;
  Vec<T> w[9];
  for (int i = 0; i < 9; ++i) w[i] = Vec<T>(d.weight[i]);
  int64_t y = 0;
  for (; y + R <= rows; y += R) depthwise_block<T, R, Behind>(d, w, y);
  for (; y + 2 <= rows; y += 2) depthwise_block<T, 2, Behind>(d, w, y);
  for (; y < rows; ++y) depthwise_block<T, 1, Behind>(d, w, y);
}

}  // namespace
}  // namespace sodfast
