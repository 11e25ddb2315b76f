// k×k max-pool with stride 1 of rows that come one after the other, and its gradient. Positions outside the map
// never win.
//
// A window grows by overlapping halves. With N₀ = the row and w₀ = 1,
//
//   N_{i+1}[x] = max(N_i[x − s_i], N_i[x])        w_{i+1} = w_i + s_i = min(2 w_i, k)
//
// is the maximum of the w_{i+1} positions that end at x; ⌈log₂ k⌉ such stages make a row of windows, and the same
// stages on those rows, kept s_i rows long each, make the maximum of k rows. That is 2⌈log₂ k⌉ maxima per element
// in one sweep from left to right, all of them vector instructions, and k − 1 rows of memory.
//
// The gradient goes the same stages back in one sweep from right to left: each hands what it gets on to the earlier
// or to the later of its two operands. Which it was, forward() leaves behind as one bit per stage and element. Ties
// go to the earlier one, and so a window's gradient to its first maximum in reading order.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/keys.h"
#include "common/scratch.h"
#include "common/window.h"

namespace sodfast {
namespace {

// How a window of k grows.
struct Stages {
  static constexpr int most = 5;  // k up to 31
  int number = 0;
  int64_t k, shift[most] = {};
  explicit Stages(int64_t window) : k(window) {
    for (int64_t w = 1; w < k; w += shift[number++]) shift[number] = least(w, k - w);
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
    return {cols, body, (((body + 2 * margin + unit - 1) / unit) | 1) * unit};
  }
};

template <class T>
void fill(T* p, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

// Takes lines from scratch memory; a line's pointer is to column 0.
template <class T>
T* take_lines(Scratch& scratch, LineShape shape, int64_t rows, T value) {
  T* p = scratch.take<T>(rows * shape.pitch);
  fill(p, value, rows * shape.pitch);
  return p + LineShape::margin;
}

// The vectors of a row on their way through a stage, each asked for the vector `shift` (below 16) positions before it
// or, backwards, after it. Wide vectors keep their neighbours in registers, others in a line.
template <class T, bool backwards>
class Neighbours {
  using V = Vec<T>;
  static constexpr int64_t lanes = V::lanes;

 public:
  Neighbours(int64_t shift, T* line, T outside)
      : window_(backwards ? shift % lanes : lanes - shift % lanes),
        line_(line),
        whole_(shift / lanes * lanes),
        one_(outside),
        two_(outside) {}

  V operator()(int64_t x, V v) {
    v = window_.turn(v);
    if constexpr (lanes == 16) {
      const V other = join(one_, v);
      one_ = v;
      return other;
    } else if constexpr (lanes == 8) {
      const V other = whole_ == 0 ? join(one_, v) : join(two_, one_);
      two_ = one_, one_ = v;
      return other;
    } else {
      v.store(line_ + x);
      const int64_t near = backwards ? x + whole_ : x - whole_, far = backwards ? near + lanes : near - lanes;
      return join(V::load(line_ + far), V::load(line_ + near));
    }
  }

 private:
  V join(V far, V near) const { return backwards ? window_.join(near, far) : window_.join(far, near); }
  Window<T> window_;
  T* line_;
  int64_t whole_;
  V one_, two_;  // the last and the last but one
};

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
  // A sweep begins before the first column: the windows that end there reach into the map.
  static constexpr int64_t lead = 16;

 public:
  // history: how many rows back() may lag behind forward(), at least 1; 0: there will be no way back.
  MaxPoolRows(int64_t k, LineShape shape, int64_t history, Scratch& scratch)
      : stages_(k),
        shape_(shape),
        history_(history == 0 ? 0 : history + k) {
    for (int i = 0; i < stages_.number; ++i) {
      newer_[i] = take_lines(scratch, shape, stages_.shift[i], lowest_key<T>());
      line_[i] = take_lines(scratch, shape, 1, lowest_key<T>());
      if (history_ == 0) continue;
      kept_[i] = take_lines(scratch, shape, stages_.shift[i], T(0));
      line_back_[i] = take_lines(scratch, shape, 1, T(0));
      won_[i] = scratch.take<LaneBits>(history_ * bits());
      std::memset(won_[i], 0, static_cast<size_t>(history_ * bits()) * sizeof(LaneBits));
    }
  }
  static int64_t bytes(int64_t k, LineShape shape, int64_t history) {
    const auto lines = [&](int64_t n) { return Scratch::bytes<T>(n * shape.pitch); };
    const Stages stages(k);
    int64_t total = 0;
    for (int i = 0; i < stages.number; ++i) {
      const int64_t each = lines(stages.shift[i]) + lines(1);
      total += history == 0 ? each : 2 * each + Scratch::bytes<LaneBits>((history + k) * bits(shape));
    }
    return total;
  }

  // Takes the next row of keys (null: a row outside the map) and calls out(x, v) for every vector of the row of
  // windows that end with it: v holds the keys of columns x, x + 1, … The row that these windows are centred on is
  // k / 2 rows back. `line` has margins of lowest keys.
  template <class Out>
  void forward(const T* line, const Out& out) {
    with_stages(stages_.number, [&](auto n) {
      history_ > 0 ? forward_stages<n.value, true>(line, out) : forward_stages<n.value, false>(line, out);
    });
    for (int i = 0; i < stages_.number; ++i) newer_slot_[i] = next(newer_slot_[i], stages_.shift[i]);
    if (history_ > 0) newest_ = next(newest_, history_);
  }

  // One row of the gradient on its way back. The rows of windows come in the order in which forward() made them, `lag`
  // rows after it; grad(x, count) is a vector of their gradient, zeros past `count` lanes. That completes the
  // gradient of the row k - 1 before, which goes into `line`.
  template <class Grad>
  void back(int64_t lag, const Grad& grad, T* line) {
    with_stages(stages_.number, [&](auto n) { back_stages<n.value>(lag, grad, line); });
    for (int i = 0; i < stages_.number; ++i) kept_slot_[i] = next(kept_slot_[i], stages_.shift[i]);
  }

  int64_t window() const { return stages_.k; }

 private:
  static int64_t next(int64_t slot, int64_t n) { return slot + 1 == n ? 0 : slot + 1; }

  // Per row and stage: the bits of the row's windows, lead included, then those of the columns' windows.
  static int64_t bits(LineShape shape) { return (lead + 2 * shape.body) / lanes; }
  int64_t bits() const { return bits(shape_); }
  LaneBits* row_bits(int i, int64_t row) const { return won_[i] + row * bits() + lead / lanes; }
  LaneBits* column_bits(int i, int64_t row) const { return row_bits(i, row) + shape_.body / lanes; }

  // std::array of what f(i) returns for i = 0 … n - 1 would need a default constructor.
  template <bool backwards, int... i>
  static auto neighbours(const Stages& stages, T* const* lines, T outside, std::integer_sequence<int, i...>) {
    struct {
      Neighbours<T, backwards> of[sizeof...(i)];
    } all{{Neighbours<T, backwards>(stages.shift[i], lines[i], outside)...}};
    return all;
  }

  template <int n, bool record, class Out>
  void forward_stages(const T* line, const Out& out) {
    T* newer[Stages::most] = {};
    LaneBits *along[Stages::most] = {}, *down[Stages::most] = {};
    for (int i = 0; i < n; ++i) {
      newer[i] = newer_[i] + newer_slot_[i] * shape_.pitch;
      if (record) along[i] = row_bits(i, newest_), down[i] = column_bits(i, newest_);
    }
    const auto column = [&](int64_t x, V v) {
#pragma GCC unroll 5
      for (int i = 0; i < n; ++i) {
        const V before = V::load(newer[i] + x);
        v.store(newer[i] + x);
        if (record) down[i][x / lanes] = greater_key(v, before);
        v = max_key(before, v);
      }
      out(x, v);
    };
    if (line == nullptr) {
      for (int64_t x = 0; x < shape_.body; x += lanes) column(x, V(lowest_key<T>()));
    } else if constexpr (n == 0) {
      for (int64_t x = 0; x < shape_.body; x += lanes) column(x, V::load(line + x));
    } else {
      auto before = neighbours<false>(stages_, line_, lowest_key<T>(), std::make_integer_sequence<int, n>());
      const T* from = line + stages_.k / 2;
      const auto row = [&](int64_t x) {
        V v = V::load(from + x);
#pragma GCC unroll 5
        for (int i = 0; i < n; ++i) {
          const V other = before.of[i](x, v);
          if (record) along[i][x / lanes] = greater_key(v, other);
          v = max_key(other, v);
        }
        return v;
      };
      for (int64_t x = -lead; x < 0; x += lanes) row(x);
      for (int64_t x = 0; x < shape_.body; x += lanes) column(x, row(x));
    }
  }

  template <int n, class Grad>
  void back_stages(int64_t lag, const Grad& grad, T* line) {
    T* kept[Stages::most] = {};
    const LaneBits *along[Stages::most] = {}, *down[Stages::most] = {};
    const auto row_before = [&](int64_t rows) { return ((newest_ - 1 - rows) % history_ + history_) % history_; };
    const int64_t complete = row_before(lag + stages_.k - 1);
    for (int i = n - 1; i >= 0; --i) {
      kept[i] = kept_[i] + kept_slot_[i] * shape_.pitch;
      down[i] = column_bits(i, row_before(lag)), along[i] = row_bits(i, complete);
      lag += stages_.shift[i];
    }
    const V zero(T(0));
    const auto column = [&](int64_t x) {
      V g = grad(x, least(lanes, shape_.cols - x));
#pragma GCC unroll 5
      for (int i = n - 1; i >= 0; --i) {
        const LaneBits later = down[i][x / lanes];
        const V before = V::load(kept[i] + x);
        where(later, g, zero).store(kept[i] + x);
        g = before + where(later, zero, g);
      }
      return g;
    };
    if constexpr (n == 0) {
      for (int64_t x = 0; x < shape_.body; x += lanes) column(x).store(line + x);
    } else {
      auto after = neighbours<true>(stages_, line_back_, T(0), std::make_integer_sequence<int, n>());
      T* to = line + stages_.k / 2;
      const auto row = [&](int64_t x, V g) {
#pragma GCC unroll 5
        for (int i = n - 1; i >= 0; --i) {
          const LaneBits later = along[i][x / lanes];
          g = where(later, g, zero) + after.of[i](x, where(later, zero, g));
        }
        g.store(to + x);
      };
      for (int64_t x = shape_.body - lanes; x >= 0; x -= lanes) row(x, column(x));
      for (int64_t x = -lanes; x >= -lead; x -= lanes) row(x, zero);
    }
  }

  Stages stages_;
  LineShape shape_;
  int64_t history_, newest_ = 0;
  T* newer_[Stages::most] = {};       // the last s_i rows of stage i
  T* kept_[Stages::most] = {};        // gradient that stage i's later operand got, s_i rows
  LaneBits* won_[Stages::most] = {};  // where the later operand won, history_ rows
  T *line_[Stages::most] = {}, *line_back_[Stages::most] = {};
  int64_t newer_slot_[Stages::most] = {}, kept_slot_[Stages::most] = {};
};

}  // namespace
}  // namespace sodfast
