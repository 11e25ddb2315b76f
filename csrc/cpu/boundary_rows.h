// Rows of the boundary of a soft map, one after the other, and the way back from their gradient.
//
//   t = z − erode₃(z)   or   dilate₃(z) − z   or   dilate₃(z) − erode₃(z)         b = max-pool_k(t)
//
// Both are maxima of keys (common/keys.h): erode₃(z) = −max₃(−z), and t, never negative, is its own key. Nothing but
// line buffers lies between z and b, or between their gradients.
// z comes from a callable: source(y) is row y, `cols` values.
#pragma once

#include <optional>

#include "cpu/kernels.h"
#include "cpu/pool_rows.h"

namespace sodfast {
namespace {

// The rows of t.
template <class T>
class ThinRows {
  using V = Vec<T>;

 public:
  // first: the first row that make() will be asked for. history: as of MaxPoolRows.
  ThinRows(const BoundaryShape& boundary, LineShape shape, int64_t first, int64_t history, Scratch& scratch)
      : shape_(shape),
        rows_(boundary.rows),
        next_(most(0, first - 1)) {
    keys_ = take_lines(scratch, shape, 1, lowest_key<T>());
    if (history > 0) eroded_ = take_lines(scratch, shape, 1, T(0)), dilated_ = take_lines(scratch, shape, 1, T(0));
    if (boundary.thin & thin_erosion) erosion_.emplace(3, shape, history, scratch);
    if (boundary.thin & thin_dilation) dilation_.emplace(3, shape, history, scratch);
  }
  static int64_t bytes(LineShape shape, int64_t history) {
    return 3 * Scratch::bytes<T>(shape.pitch) + 2 * MaxPoolRows<T>::bytes(3, shape, history);
  }

  // Row q of t, with margins of lowest keys, into line; q goes up by one from call to call.
  template <class Source>
  void make(int64_t q, const Source& source, T* line) {
    for (; next_ <= q + 1; ++next_) {
      const bool wanted = next_ == q + 1;
      const T* z = source(least(q, rows_ - 1));
      if (erosion_) {
        erosion_->forward(key_line(next_, true, source), [&](int64_t x, V v) {
          if (!wanted) return;
          const V minus_e = value_of(v);
          if (dilation_)
            minus_e.store(line + x);
          else
            without_sign(load(z + x, least(V::lanes, shape_.cols - x)) + minus_e).store(line + x);
        });
      }
      if (dilation_) {
        dilation_->forward(key_line(next_, false, source), [&](int64_t x, V v) {
          if (!wanted) return;
          const V other = erosion_ ? V::load(line + x) : V(T(0)) - load(z + x, least(V::lanes, shape_.cols - x));
          without_sign(value_of(v) + other).store(line + x);
        });
      }
    }
    fill(line + shape_.cols, lowest_key<T>(), shape_.body + LineShape::margin - shape_.cols);
  }

  // Takes gt, the gradient of t's row q (null: of a row past the last), and calls out(x, count, g) with the gradient
  // of z's row q − 1; before is the gt of the call before.
  template <class Out>
  void back(int64_t q, const T* gt, const T* before, bool wanted, const Out& out) {
    const int64_t lag = next_ - 2 - q;
    const auto grad = [&](int64_t x, int64_t count) { return gt == nullptr ? V(T(0)) : load(gt + x, count); };
    if (erosion_) erosion_->back(lag, grad, eroded_);
    if (dilation_) dilation_->back(lag, grad, dilated_);
    if (!wanted) return;
    const T *plus = dilation_ ? dilated_ : before, *minus = erosion_ ? eroded_ : before;
    for_each_vector<T>(
        shape_.cols, [&](int64_t x, int64_t count) { out(x, count, load(plus + x, count) - load(minus + x, count)); });
  }

 private:
  template <class Source>
  const T* key_line(int64_t y, bool negate, const Source& source) {
    if (y >= rows_) return nullptr;
    const T* z = source(y);
    for_each_vector<T>(shape_.cols, [&](int64_t x, int64_t count) {
      const V v = load(z + x, count);
      store(key_of(negate ? V(T(0)) - v : v), keys_ + x, count);
    });
    return keys_;
  }

  LineShape shape_;
  int64_t rows_, next_;  // next_: the first row of z that the pools have not seen
  T *keys_, *eroded_ = nullptr, *dilated_ = nullptr;
  std::optional<MaxPoolRows<T>> erosion_, dilation_;
};

// The rows of b.
template <class T>
class BoundaryRows {
 public:
  // first: the first row that row() will be asked for.
  BoundaryRows(const BoundaryShape& boundary, LineShape shape, int64_t first, Scratch& scratch)
      : rows_(boundary.rows),
        radius_(boundary.k / 2),
        next_(most(0, first - radius_)),
        thin_(boundary, shape, next_, 0, scratch),
        pool_(boundary.k, shape, 0, scratch) {
    line_ = take_lines(scratch, shape, 1, lowest_key<T>());
  }
  static int64_t bytes(const BoundaryShape& boundary, LineShape shape) {
    return ThinRows<T>::bytes(shape, 0) + MaxPoolRows<T>::bytes(boundary.k, shape, 0) + Scratch::bytes<T>(shape.pitch);
  }

  // Calls out(x, b) for every vector of row y; y goes up by one from call to call.
  template <class Source, class Out>
  void row(int64_t y, const Source& source, const Out& out) {
    for (; next_ <= y + radius_; ++next_) {
      const T* line = nullptr;
      if (next_ < rows_) {
        thin_.make(next_, source, line_);
        line = line_;
      }
      if (next_ < y + radius_)
        pool_.forward(line, [](int64_t, Vec<T>) {});
      else
        pool_.forward(line, out);
    }
  }

 private:
  int64_t rows_, radius_, next_;
  ThinRows<T> thin_;
  MaxPoolRows<T> pool_;
  T* line_;
};

// The gradient of rows [begin, end) of z.
template <class T>
class BoundaryBack {
 public:
  BoundaryBack(const BoundaryShape& boundary, LineShape shape, int64_t begin, int64_t end, Scratch& scratch)
      : rows_(boundary.rows),
        begin_(begin),
        end_(end),
        first_(most(0, begin - 1)),
        last_(least(rows_ - 1, end)),
        first_window_(most(0, first_ - boundary.k / 2)),
        first_row_(most(0, first_window_ - boundary.k / 2)),
        shape_(shape),
        thin_(boundary, shape, first_row_, boundary.k, scratch),
        pool_(boundary.k, shape, 1, scratch) {
    line_ = take_lines(scratch, shape, 1, lowest_key<T>());
    for (T*& gt : gts_) gt = take_lines(scratch, shape, 1, T(0));
  }
  static int64_t bytes(const BoundaryShape& boundary, LineShape shape) {
    return ThinRows<T>::bytes(shape, boundary.k) + MaxPoolRows<T>::bytes(boundary.k, shape, 1) +
           3 * Scratch::bytes<T>(shape.pitch);
  }
  // How many of the latest rows of z the source must hold.
  static int64_t rows_in_use(const BoundaryShape& boundary) { return boundary.k + 2; }
  int64_t first_window() const { return first_window_; }

  // grad(y) is row y of the gradient of b, asked for once per row from first_window() on; out(y, x, count, g) gets
  // that of z.
  template <class Source, class Grad, class Out>
  void run(const Source& source, const Grad& grad, const Out& out) {
    const int64_t k = pool_.window(), last_window = least(rows_ - 1, last_ + k / 2);
    const Vec<T> zero(T(0));
    int64_t q = first_row_ - k + 1;  // the row of t whose gradient is complete
    for (int64_t p = first_row_; q <= last_; ++p, ++q) {
      T* line = nullptr;
      if (p < rows_) thin_.make(p, source, line = line_);
      pool_.forward(line, [](int64_t, Vec<T>) {});
      const int64_t y = p - k / 2;
      const T* g = y < first_window_ || y > last_window ? nullptr : grad(y);
      T* gt = gts_[q & 1];
      pool_.back(0, [&](int64_t x, int64_t count) { return g == nullptr ? zero : load(g + x, count); }, gt);
      if (q >= first_) back_thin(q, gt, out);
    }
    if (end_ == rows_) back_thin(rows_, nullptr, out);
  }

 private:
  template <class Out>
  void back_thin(int64_t q, const T* gt, const Out& out) {
    thin_.back(q, gt, gts_[(q - 1) & 1], q - 1 >= begin_,
               [&](int64_t x, int64_t count, Vec<T> v) { out(q - 1, x, count, v); });
  }

  int64_t rows_, begin_, end_, first_, last_, first_window_, first_row_;
  LineShape shape_;
  ThinRows<T> thin_;
  MaxPoolRows<T> pool_;
  T *line_, *gts_[2];  // a row of t, and two of its gradient
};

}  // namespace
}  // namespace sodfast
