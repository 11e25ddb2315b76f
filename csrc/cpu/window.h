// Line buffers that follow a computation down the rows of a map.
#pragma once

#include <cstring>

#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/taps.h"

#if defined(__SSE4_2__)
#include <immintrin.h>
#endif

namespace sodfast {
namespace {

// Items per channel: planes an odd number of cache lines apart fall into different sets of the cache.
inline int64_t staggered(int64_t items) {
  const int64_t lines = (items + 15) / 16;
  return (lines + 1 - lines % 2) * 16;
}

// The rows [first, end) of some channels. Around each row are zeros: `margin` of them before the first, and behind
// each whatever its pitch leaves.
struct Window {
  static constexpr int64_t room = 64;  // so that whole vectors may be read past the last row

  float* data;
  int64_t channels, capacity, pitch, plane, first = 0, end = 0;

  static int64_t items(int64_t channels, int64_t capacity, int64_t pitch, int64_t margin = 16) {
    return channels == 0 ? 0 : margin + channels * staggered(capacity * pitch + margin) + room;
  }
  Window(Scratch& scratch, int64_t n, int64_t rows, int64_t row_pitch, int64_t margin = 16)
      : data(scratch.take<float>(items(n, rows, row_pitch, margin)) + margin),
        channels(n),
        capacity(rows),
        pitch(row_pitch),
        plane(staggered(rows * row_pitch + margin)) {
    for (int64_t c = 0; c < n; ++c) std::memset(data + c * plane - margin, 0, margin * sizeof(float));
  }

  float* row(int64_t c, int64_t y) const { return data + c * plane + (y - first) * pitch; }
  void begin(int64_t y) { first = end = y; }
  // Forgets the rows before y.
  void drop(int64_t y) {
    const int64_t kept = end - y;
    if (y == first) return;
    if (kept > 0)
      for (int64_t c = 0; c < channels; ++c) std::memmove(data + c * plane, row(c, y), kept * pitch * sizeof(float));
    first = y;
    end = kept > 0 ? end : y;
  }
  void zero_rows(int64_t y, int64_t n) const {
    for (int64_t c = 0; n > 0 && c < channels; ++c) std::memset(row(c, y), 0, n * pitch * sizeof(float));
  }
  void zero_behind(float* row, int64_t cols) const { std::memset(row + cols, 0, (pitch - cols) * sizeof(float)); }
};

// A row copied with zeros behind it, up to `length`: both are whole vectors in `to`. (memcpy and memset of a dozen
// numbers each would take longer than a depthwise convolution of them.)
inline void pad_row(const float* from, int64_t cols, float* to, int64_t length) {
  constexpr int64_t L = Vec<float>::lanes;
  int64_t x = 0;
  for (; x + L <= cols; x += L) Vec<float>::load(from + x).store(to + x);
  if (x < cols) Vec<float>::load(from + x, cols - x).store(to + x), x += L;
  for (; x < length; x += L) Vec<float>(0.0f).store(to + x);
}
// The same of 2 · cols numbers: the even ones, and the odd ones from to + length on.
inline void pad_split_row(const float* from, int64_t cols, float* to, int64_t length) {
  constexpr int64_t L = Vec<float>::lanes;
  int64_t x = 0;
  const auto split = [&](Vec<float> low, Vec<float> high) {
    Vec<float> even, odd;
    deinterleave(low, high, even, odd);
    even.store(to + x), odd.store(to + length + x);
  };
  for (; x + L <= cols; x += L) split(Vec<float>::load(from + 2 * x), Vec<float>::load(from + 2 * x + L));
  if (const int64_t rest = 2 * (cols - x); rest > 0) {
    const float* p = from + 2 * x;
    split(load(p, least(rest, L)), rest > L ? load(p + L, rest - L) : Vec<float>(0.0f)), x += L;
  }
  for (; x < length; x += L) Vec<float>(0.0f).store(to + x), Vec<float>(0.0f).store(to + length + x);
}

// Arithmetic on subnormal numbers is many times slower, and nothing that small can reach the output.
class FlushDenormals {
 public:
#if defined(__SSE4_2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// f(s, begin, end) for row ranges that cover all rows of all scales; a thread gets one range of each scale.
template <class Rows, class F>
void for_row_ranges(int scales, const Rows& rows, int64_t work, const Parallel& parallel, const F& f) {
  constexpr int64_t pieces = 16;
  const int64_t n = pieces * scales;
  parallel(n, grain_for(work / n), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushDenormals flush;
    for (int s = 0; s < scales; ++s) {
      const int64_t p0 = (begin - s + scales - 1) / scales, p1 = (end - s + scales - 1) / scales;
      const int64_t y0 = p0 * rows(s) / pieces, y1 = p1 * rows(s) / pieces;
      if (y0 < y1) f(s, y0, y1);
    }
  });
}

}  // namespace

namespace SODFAST_ISA {
namespace {

// Convolves `rows` rows; the taps point into the first, in_pitch from one row to the next.
inline void conv_rows(const RowConv<float>& conv, int64_t in_pitch, int64_t in_row, int64_t out_pitch, int64_t rows,
                      int64_t cols) {
  constexpr int64_t L = Vec<float>::lanes, most_places = 256;
  Place places[most_places];
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t x = 0; x < cols; x += L) {
      places[n++] = {(in_row + r) * in_pitch + x, r * out_pitch + x, cols - x < L ? cols - x : L};
      if (n == most_places) conv_vectors(conv, places, n), n = 0;
    }
  conv_vectors(conv, places, n);
}

// Convolves whole vectors from column `begin` to `end` of one long row.
inline void conv_span(const RowConv<float>& conv, int64_t begin, int64_t end) {
  constexpr int64_t L = Vec<float>::lanes, most_places = 240;
  Place places[most_places];
  int64_t n = 0;
  for (int64_t x = begin; x < end; x += L) {
    places[n++] = {x, x, L};
    if (n == most_places) conv_vectors(conv, places, n), n = 0;
  }
  conv_vectors(conv, places, n);
}

}  // namespace
}  // namespace SODFAST_ISA
}  // namespace sodfast
