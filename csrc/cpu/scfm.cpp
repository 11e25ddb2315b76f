// The fusion of SCFNet's SCFM, and its gradients, without the upsampled map in memory.
//
//   out = x + x up(y)   or   x + up(y)          up: bilinear to the size of x, align_corners=False
//   source of position d: max(0, (d + ½) n / N − ½)          n of y, N of x
//
// Forward reads x and y and writes out once, some 3 operations per element. Backward reads g, x and y and writes gx
// and gy once: up's transpose adds rows of g x to the two rows of y that they lie between, and sums a row up along
// itself when it is complete. Sums run in the order of positions, whoever does which rows.
#include <cstring>
#include <type_traits>

#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/table.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// Where the positions of one axis of x fall on that of y: between `lower` and lower + 1, with `weight` on the second.
// The last position of y is repeated for that.
template <class T>
class Axis {
 public:
  static constexpr int64_t lanes = Vec<T>::lanes;
  Axis(int64_t n, int64_t from) : n_(n), from_(from), lower_(padded()), step_(padded()), weight_(padded()) {
    const double scale = static_cast<double>(from) / static_cast<double>(n);
    for (int64_t d = 0; d < padded(); ++d) {
      const double source = scale * (static_cast<double>(least(d, n - 1)) + 0.5) - 0.5;
      const int64_t i = source > 0 ? least(static_cast<int64_t>(source), from - 1) : 0;
      lower_.data()[d] = static_cast<int32_t>(i);
      weight_.data()[d] = source > 0 ? static_cast<T>(source - static_cast<double>(i)) : T(0);
      step_.data()[d] = lower_.data()[d] - lower_.data()[d / lanes * lanes];
    }
  }
  int64_t lower(int64_t d) const { return lower_.data()[d]; }
  T weight(int64_t d) const { return weight_.data()[d]; }
  int64_t padded() const { return (n_ + lanes - 1) / lanes * lanes; }  // to whole vectors
  int64_t from() const { return from_; }
  bool doubles() const { return n_ == 2 * from_; }
  bool enlarges() const { return n_ >= from_; }

  // The first position whose lower is at least i.
  int64_t first(int64_t i) const {
    int64_t a = 0, b = n_;
    while (a < b) {
      const int64_t middle = (a + b) / 2;
      lower(middle) < i ? a = middle + 1 : b = middle;
    }
    return a;
  }

  // A vector of the positions from x on, of a line that has its last value twice. A vector of an enlarged line lies
  // within a vector of the line itself.
  template <bool enlarge>
  Vec<T> blend(const T* line, int64_t x) const {
    const T* p = line + lower_.data()[x];
    const int32_t* step = step_.data() + x;
    const Vec<T> w = Vec<T>::load(weight_.data() + x), rest = Vec<T>(T(1)) - w;
    if constexpr (enlarge) {
      return fma(w, permute(p + 1, step), rest * permute(p, step));
    } else {
      T a[lanes], b[lanes];
      for (int64_t i = 0; i < lanes; ++i) a[i] = p[step[i]], b[i] = p[step[i] + 1];
      return fma(w, Vec<T>::load(b), rest * Vec<T>::load(a));
    }
  }

  // gy = the transpose of blend() of a whole row, `wide`, which has a readable zero on both sides.
  void transpose(const T* __restrict wide, T* __restrict gy) const {
    if (doubles()) {
      for (int64_t i = 0; i < from_; ++i)
        gy[i] = T(0.25) * (wide[2 * i - 1] + wide[2 * i + 2]) + T(0.75) * (wide[2 * i] + wide[2 * i + 1]);
      gy[0] += T(0.25) * wide[0];
      gy[from_ - 1] += T(0.25) * wide[n_ - 1];
      return;
    }
    T here = 0, after = 0;
    int64_t i = 0;
    for (int64_t x = 0; x < n_; ++x) {
      for (; i < lower(x); ++i) gy[i] = here, here = after, after = 0;
      here += (1 - weight(x)) * wide[x];
      after += weight(x) * wide[x];
    }
    for (; i < from_; ++i) gy[i] = here, here = after, after = 0;
    gy[from_ - 1] += here;  // beyond the last is the last
  }

 private:
  int64_t n_, from_;
  Heap<int32_t> lower_, step_;
  Heap<T> weight_;
};

// The rows of up(y), each a blend of two rows of y that are enlarged along themselves once and then kept.
template <class T, bool enlarge>
class UpsampledRows {
 public:
  UpsampledRows(const T* y, const Axis<T>& down, const Axis<T>& along, Scratch& scratch)
      : y_(y),
        down_(down),
        along_(along),
        line_(scratch.take<T>(along.from() + 1 + Vec<T>::lanes)),
        here_(scratch.take<T>(along.padded())),
        after_(scratch.take<T>(along.padded())) {
    std::memset(line_, 0, (along.from() + 1 + Vec<T>::lanes) * sizeof(T));  // whole vectors are read
  }
  static int64_t bytes(const Axis<T>& along) {
    return Scratch::bytes<T>(along.from() + 1 + Vec<T>::lanes) + 2 * Scratch::bytes<T>(along.padded());
  }

  void go_to(int64_t r) {
    const int64_t i = down_.lower(r);
    if (i != row_) {
      T* const old = here_;
      here_ = after_, after_ = old;
      if (row_ < 0 || i != row_ + 1) enlarged(i, here_);
      enlarged(least(i + 1, down_.from() - 1), after_);
      row_ = i;
    }
    weight_ = Vec<T>(down_.weight(r)), rest_ = Vec<T>(1 - down_.weight(r));
  }
  Vec<T> at(int64_t x) const { return fma(weight_, Vec<T>::load(after_ + x), rest_ * Vec<T>::load(here_ + x)); }

 private:
  void enlarged(int64_t i, T* to) const {
    const int64_t cols = along_.from();
    std::memcpy(line_, y_ + i * cols, cols * sizeof(T));
    line_[cols] = line_[cols - 1];
    for (int64_t x = 0; x < along_.padded(); x += Vec<T>::lanes) along_.template blend<enlarge>(line_, x).store(to + x);
  }

  const T* y_;
  const Axis<T>&down_, &along_;
  T *line_, *here_, *after_;  // rows row_ and row_ + 1 of y, enlarged
  int64_t row_ = -1;
  Vec<T> weight_, rest_;
};

// Calls f(plane, begin, end) for the parts of planes of `rows` rows in each task's range.
template <class F>
void for_each_part(int64_t planes, int64_t rows, int64_t work_per_row, const Parallel& parallel, const F& f) {
  parallel(planes * rows, grain_for(work_per_row), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % rows, last = least(rows, first + end - begin);
      f(begin / rows, first, last);
      begin += last - first;
    }
  });
}

// Calls f(true_type or false_type).
template <class F>
void for_flag(bool flag, const F& f) {
  flag ? f(std::true_type()) : f(std::false_type());
}

template <class T>
void scfm(const ScfmShape& shape, const T* x, const T* y, T* out, const Parallel& parallel) {
  const Axis<T> down(shape.rows, shape.from_rows), along(shape.cols, shape.from_cols);
  for_each_part(shape.planes, shape.rows, 4 * shape.cols, parallel, [&](int64_t plane, int64_t begin, int64_t end) {
    for_flag(along.enlarges(), [&](auto enlarge) {
      for_flag(shape.multiply, [&](auto multiply) {
        Scratch scratch(UpsampledRows<T, enlarge>::bytes(along));
        UpsampledRows<T, enlarge> up(y + plane * shape.from_rows * shape.from_cols, down, along, scratch);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t start = (plane * shape.rows + r) * shape.cols;
          up.go_to(r);
          for_each_vector<T>(shape.cols, [&](int64_t i, int64_t n) {
            const Vec<T> v = load(x + start + i, n);
            store(multiply ? fma(v, up.at(i), v) : v + up.at(i), out + start + i, n);
          });
        }
      });
    });
  });
}

// Rows [begin, end) of gy of one plane, and the rows of gx that lie below one of them.
template <class T, bool enlarge, bool multiply>
void plane_backward(const ScfmShape& shape, const Axis<T>& down, const Axis<T>& along, const T* g, const T* x,
                    const T* y, T* gx, T* gy, int64_t begin, int64_t end) {
  const int64_t cols = shape.cols, from = shape.from_cols, wide = cols + 2 + Vec<T>::lanes;
  Scratch scratch(2 * Scratch::bytes<T>(wide) + UpsampledRows<T, enlarge>::bytes(along));
  T *here = scratch.take<T>(wide) + 1, *after = scratch.take<T>(wide) + 1;
  UpsampledRows<T, enlarge> up(y, down, along, scratch);
  std::memset(here - 1, 0, wide * sizeof(T));
  std::memset(after - 1, 0, wide * sizeof(T));
  int64_t i = most(0, begin - 1);  // the row of y that `here` belongs to
  const auto finish = [&] {
    if (i >= begin) along.transpose(here, gy + i * from);
    T* const done = here;
    here = after, after = done;
    std::memset(after, 0, cols * sizeof(T));
    ++i;
  };
  for (int64_t r = down.first(i); r < shape.rows && down.lower(r) < end; ++r) {
    while (i < down.lower(r)) finish();
    const T *g_row = g + r * cols, *x_row = x + r * cols;
    const bool mine = multiply && i >= begin;
    T* gx_row = mine ? gx + r * cols : nullptr;
    if (mine) up.go_to(r);
    const T w = i == down.from() - 1 ? T(0) : down.weight(r);  // beyond the last is the last
    const Vec<T> lower(1 - w), upper(w);
    for_each_vector<T>(cols, [&](int64_t k, int64_t n) {
      Vec<T> v = load(g_row + k, n);
      if (mine) store(fma(v, up.at(k), v), gx_row + k, n);
      if (multiply) v = v * load(x_row + k, n);
      store(fma(lower, v, load(here + k, n)), here + k, n);
      store(fma(upper, v, load(after + k, n)), after + k, n);
    });
  }
  while (i < end) finish();
}

template <class T>
void scfm_backward(const ScfmShape& shape, const T* g, const T* x, const T* y, T* gx, T* gy, const Parallel& parallel) {
  const Axis<T> down(shape.rows, shape.from_rows), along(shape.cols, shape.from_cols);
  const int64_t work = 8 * shape.cols * (1 + shape.rows / shape.from_rows);
  for_each_part(shape.planes, shape.from_rows, work, parallel, [&](int64_t plane, int64_t begin, int64_t end) {
    const int64_t large = plane * shape.rows * shape.cols, small = plane * shape.from_rows * shape.from_cols;
    for_flag(along.enlarges(), [&](auto enlarge) {
      for_flag(shape.multiply, [&](auto multiply) {
        plane_backward<T, enlarge, multiply>(shape, down, along, g + large, x + large, y + small,
                                             multiply ? gx + large : nullptr, gy + small, begin, end);
      });
    });
  });
}

}  // namespace

template <class T>
void add_scfm(Kernels<T>& table) {
  table.scfm = scfm<T>;
  table.scfm_backward = scfm_backward<T>;
}
SODFAST_INSTANTIATE(add_scfm)

}  // namespace SODFAST_ISA
}  // namespace sodfast
