// k×k max-pool with stride 1 of rows that come one after the other, and its gradient. Positions outside the map
// never win.
//
// A window grows by overlapping halves. With N₀ = the row and w₀ = 1,
//
//   N_{i+1}[x] = max(N_i[x − s_i], N_i[x])        w_{i+1} = w_i + s_i = min(2 w_i, k)
//
// is the maximum of the w_{i+1} positions that end at x; ⌈log₂ k⌉ such stages make a row of windows, and the same
// stages on those rows, kept s_i rows long each, make the maximum of k rows. That is 2⌈log₂ k⌉ maxima per element,
// all of them vector instructions, and k − 1 rows of memory. The gradient goes the same stages back: each
// hands what it gets on to the earlier or to the later of its two operands. Down the columns forward() leaves a bit
// per stage and element (who won); along a row the comparison is made again.
//
// Ties go to the first operand, and so a window's gradient to its first maximum in reading order.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/keys.h"
#include "common/scratch.h"

namespace sodfast {
namespace {

constexpr int64_t largest_window = 31;

// How a window of k grows.
struct Stages {
  int number = 0;
  int64_t k, shift[5] = {}, width[5] = {};  // width: before the stage
  explicit Stages(int64_t window) : k(window) {
    for (int64_t w = 1; w < k; w += shift[number++]) width[number] = w, shift[number] = w < k - w ? w : k - w;
  }
};

// A row in memory: whole vectors, with room on both sides for what windows read past the map's ends.
struct LineShape {
  static constexpr int64_t margin = 32;
  int64_t cols, body, pitch;
  template <class T>
  static LineShape of(int64_t cols) {
    constexpr int64_t lanes = Vec<T>::lanes, unit = Scratch::align / static_cast<int64_t>(sizeof(T));
    const int64_t body = (cols + lanes - 1) / lanes * lanes;
    // An odd number of cache lines: rows above each other then do not share cache sets.
    return {cols, body, ((body + 2 * margin + unit - 1) / unit | 1) * unit};
  }
  int64_t extended() const { return body + 16; }  // of windows that end past the last column
};

template <class T>
void fill(T* p, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// Calls f(std::integral_constant<int, n>).
template <class F>
void with_stages(int n, const F& f) {
  switch (n) {
    case 0:
      return f(std::integral_constant<int, 0>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    default:
      return f(std::integral_constant<int, 5>());
  }
}

template <class T>
class MaxPoolRows {
  using V = Vec<T>;
  static constexpr int64_t lanes = V::lanes;

 public:
  // history: how many rows back() may lag behind forward(); 0: there will be no way back.
  MaxPoolRows(int64_t k, LineShape shape, int64_t history, Scratch& scratch)
      : stages_(k),
        shape_(shape),
        history_(history == 0 ? 0 : history + k) {
    a_ = line(scratch), b_ = line(scratch);
    for (int i = 0; i < stages_.number; ++i) {
      newer_[i] = block(scratch, stages_.shift[i], lowest_key<T>());
      if (history_ == 0) continue;
      own_[i] = block(scratch, stages_.shift[i], T(0));
      const int64_t n = history_ * (shape.body / lanes);
      won_[i] = scratch.take<LaneBits>(n);
      std::memset(won_[i], 0, static_cast<size_t>(n) * sizeof(LaneBits));
      if (i > 0) row_stage_[i] = line(scratch);
    }
    if (history_ > 0) grad_ = scratch.take<T>(shape.pitch);
  }
  static int64_t bytes(int64_t k, LineShape shape, int64_t history) {
    const int64_t row = Scratch::bytes<T>(shape.pitch), number = Stages(k).number;
    int64_t total = 2 * row + Scratch::bytes<T>((k - 1) * shape.pitch) + number * Scratch::bytes<T>(0);
    if (history > 0) {
      total += (k - 1) * row + number * (row + Scratch::bytes<T>(0)) + row +
               number * Scratch::bytes<LaneBits>((history + k) * (shape.body / lanes));
    }
    return total;
  }

  // Takes the next row of keys (null: a row outside the map) and calls out(x, v) for every vector of the row of
  // windows that end with it: v holds the keys of columns x, x + 1, … The row that these windows are centred on is
  // k / 2 rows back. `line` has a margin of lowest keys on both sides.
  template <class Out>
  void forward(const T* line, const Out& out) {
    with_stages(stages_.number, [&](auto n) {
      history_ > 0 ? forward_stages<n.value, true>(line, out) : forward_stages<n.value, false>(line, out);
    });
    for (int i = 0; i < stages_.number; ++i) newer_slot_[i] = next(newer_slot_[i], stages_.shift[i]);
    if (history_ > 0) newest_ = next(newest_, history_);
  }

  // One row of the gradient on its way back. The rows of windows come in the order in which forward() made them,
  // `lag` rows after it; grad(x, count) is a vector of their gradient. The gradient of the row k - 1 before is then
  // complete but for its own row windows, which line() finishes.
  template <class Grad>
  void back(int64_t lag, const Grad& grad) {
    const LaneBits* won[5] = {};
    T* own[5] = {};
    for (int i = stages_.number - 1; i >= 0; --i) {
      int64_t row = newest_ - 1 - lag;
      while (row < 0) row += history_;
      won[i] = won_[i] + row * (shape_.body / lanes);
      own[i] = own_[i] + own_slot_[i] * shape_.pitch + LineShape::margin;
      own_slot_[i] = next(own_slot_[i], stages_.shift[i]);
      lag += stages_.shift[i];
    }
    T* to = grad_ + LineShape::margin + stages_.k / 2;
    const V zero(T(0));
    with_stages(stages_.number, [&](auto n) {
      for_each_vector<T>(shape_.cols, [&](int64_t x, int64_t count) {
        V g = grad(x, count);
        for (int i = n.value - 1; i >= 0; --i) {
          const LaneBits later = won[i][x / lanes];
          const V before = V::load(own[i] + x);
          where(later, g, zero).store(own[i] + x);
          g = before + where(later, zero, g);
        }
        g.store(to + x);
      });
    });
    // Where row windows are centred off the map there is no gradient.
    fill(grad_, T(0), LineShape::margin + stages_.k / 2);
    fill(to + shape_.body, T(0), grad_ + shape_.pitch - (to + shape_.body));
  }

  // Ends what back() began: row is that row of keys, with margins, and out(x, count, g) gets its gradient.
  template <class Out>
  void back_along(const T* row, const Out& out) {
    const T* from[5] = {row};
    for (int i = 0; i + 1 < stages_.number; ++i) {
      T* to = row_stage_[i + 1];
      widen(from[i], stages_.shift[i], to);
      from[i + 1] = to;
    }
    T* g = grad_ + LineShape::margin;
    for (int i = stages_.number - 1; i > 0; --i) {
      const T* keys = from[i];
      const int64_t s = stages_.shift[i];
      for (int64_t x = 0; x < shape_.extended(); x += lanes) gather(keys, g, x, s).store(g + x);
    }
    for_each_vector<T>(shape_.cols, [&](int64_t x, int64_t count) {
      out(x, count, stages_.number == 0 ? V::load(g + x) : gather(row, g, x, 1));
    });
  }

  int64_t window() const { return stages_.k; }

 private:
  static int64_t next(int64_t slot, int64_t n) { return slot + 1 == n ? 0 : slot + 1; }

  T* line(Scratch& scratch) { return block(scratch, 1, lowest_key<T>()) + LineShape::margin; }
  T* block(Scratch& scratch, int64_t rows, T value) {
    T* p = scratch.take<T>(rows * shape_.pitch);
    fill(p, value, rows * shape_.pitch);
    return p;
  }

  // The gradient of N_i[x] from that of N_{i+1}.
  static V gather(const T* keys, const T* g, int64_t x, int64_t s) {
    const V here = V::load(keys + x), zero(T(0));
    return where(greater_key(here, V::load(keys + x - s)), V::load(g + x), zero) +
           where(greater_key(V::load(keys + x + s), here), zero, V::load(g + x + s));
  }

  void widen(const T* from, int64_t s, T* to) const {
    for (int64_t x = 0; x < shape_.extended(); x += lanes)
      max_key(V::load(from + x - s), V::load(from + x)).store(to + x);
  }
  static V widen_twice(const T* from, int64_t s, int64_t t) {
    return max_key(max_key(V::load(from - s - t), V::load(from - t)), max_key(V::load(from - s), V::load(from)));
  }

  template <int n, bool record, class Out>
  void forward_stages(const T* line, const Out& out) {
    const T* from = line;
    const int64_t *s = stages_.shift, half = stages_.k / 2;
    int i = 0;
    if (line != nullptr && (n == 3 || n == 5)) {
      widen(from, s[0], a_);
      from = a_, i = 1;
    }
    if (line != nullptr && n >= 4) {
      T* to = n == 4 ? a_ : b_;
      for (int64_t x = 0; x < shape_.extended(); x += lanes) widen_twice(from + x, s[i], s[i + 1]).store(to + x);
      from = to, i += 2;
    }
    T* newer[5] = {};
    LaneBits* won[5] = {};
    for (int j = 0; j < n; ++j) {
      newer[j] = newer_[j] + newer_slot_[j] * shape_.pitch + LineShape::margin;
      if (record) won[j] = won_[j] + newest_ * (shape_.body / lanes);
    }
    for (int64_t x = 0; x < shape_.body; x += lanes) {
      V v(lowest_key<T>());
      if (line != nullptr) v = n == 0 ? V::load(line + x) : widen_twice(from + x + half, s[i], s[i + 1]);
#pragma GCC unroll 5
      for (int j = 0; j < n; ++j) {
        const V before = V::load(newer[j] + x);
        v.store(newer[j] + x);
        if (record) won[j][x / lanes] = greater_key(v, before);
        v = max_key(before, v);
      }
      out(x, v);
    }
  }

  Stages stages_;
  LineShape shape_;
  int64_t history_, newest_ = 0;
  T *a_, *b_;              // N_i on the way
  T* newer_[5] = {};       // the last s_i rows of stage i
  T* own_[5] = {};         // gradient of s_i rows that their later operand kept
  LaneBits* won_[5] = {};  // in which lanes the later operand won
  T* row_stage_[5] = {};   // N_i of one row on the way back
  T* grad_ = nullptr;
  int64_t newer_slot_[5] = {}, own_slot_[5] = {};
};

}  // namespace
}  // namespace sodfast
