// The fusion of SCFNet's SCFM, and its gradients, without the upsampled map in memory.
//
//   out = x + x up(y)   or   x + up(y)          up: bilinear to the size of x, align_corners=False
//   source of position d: max(0, (d + ½) n / N − ½)          n of y, N of x
//
// A map is a number of rows of pixels, and a pixel one value (a plane of a contiguous tensor) or the values of all
// channels (an image that lies channels last): then a vector runs along the channels, and nothing is shuffled.
//
// Forward reads x and y and writes out once, some 3 operations per element; the two rows of y that a row of x lies
// between are enlarged along themselves once for all such rows. Backward reads g, x and y and writes gx and gy once:
// up's transpose adds rows of g x, two at a time, to the two rows of y that they lie between, and sums a row up along
// itself when it is complete. Sums run in the order of positions, whoever does which rows.
#include <cstring>
#include <type_traits>

#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/table.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// Where the positions of one axis of x fall on that of y: between `lower` and the position after it, with `weight` on
// the second. After the last position comes the last.
template <class T>
class Axis {
 public:
  static constexpr int64_t lanes = Vec<T>::lanes;
  Axis(int64_t n, int64_t from)
      : n_(n),
        from_(from),
        lower_(padded()),
        step_(padded()),
        step_after_(padded()),
        weight_(padded()) {
    const double scale = static_cast<double>(from) / static_cast<double>(n);
    for (int64_t d = 0; d < padded(); ++d) {
      const double source = scale * (static_cast<double>(least(d, n - 1)) + 0.5) - 0.5;
      const int64_t i = source > 0 ? least(static_cast<int64_t>(source), from - 1) : 0;
      const int64_t first = d % lanes == 0 ? i : lower(d / lanes * lanes), after = least(i + 1, from - 1);
      lower_.data()[d] = static_cast<int32_t>(i);
      weight_.data()[d] = source > 0 ? static_cast<T>(source - static_cast<double>(i)) : T(0);
      step_.data()[d] = static_cast<int32_t>(i - first);
      step_after_.data()[d] = static_cast<int32_t>(after - first);
      reach_ = most(reach_, after - first);
    }
  }
  int64_t lower(int64_t d) const { return lower_.data()[d]; }
  T weight(int64_t d) const { return weight_.data()[d]; }
  int64_t size() const { return n_; }
  int64_t from() const { return from_; }

  // The first position whose lower is at least i.
  int64_t first(int64_t i) const {
    int64_t a = 0, b = n_;
    while (a < b) {
      const int64_t middle = (a + b) / 2;
      lower(middle) < i ? a = middle + 1 : b = middle;
    }
    return a;
  }

  // Whether a vector of positions needs no more than a vector of y.
  bool permutes() const { return reach_ < lanes; }

  // The vector of positions from d on, of a row of y; permuted: one with a whole vector to read from every position on.
  template <bool permuted>
  Vec<T> blend(const T* row, int64_t d) const {
    const T* p = row + lower(d);
    const int32_t *step = step_.data() + d, *step_after = step_after_.data() + d;
    const Vec<T> w = Vec<T>::load(weight_.data() + d), rest = Vec<T>(T(1)) - w;
    if constexpr (permuted) {
      return fma(w, permute(p, step_after), rest * permute(p, step));
    } else {
      T a[lanes], b[lanes];
      for (int64_t i = 0; i < lanes; ++i) a[i] = p[step[i]], b[i] = p[step_after[i]];
      return fma(w, Vec<T>::load(b), rest * Vec<T>::load(a));
    }
  }

 private:
  int64_t padded() const { return (n_ + lanes - 1) / lanes * lanes; }  // to whole vectors

  int64_t n_, from_, reach_ = 0;
  Heap<int32_t> lower_, step_, step_after_;
  Heap<T> weight_;
};

// What a pixel is, and how rows of y are enlarged: one value, found in a vector of y or one by one; or channels.
enum class Pixel { permuted, gathered, channels };

// A row of y along the row of x, and the transpose of that.
template <class T, Pixel pixel>
class Enlarged {
 public:
  static constexpr int64_t lanes = Vec<T>::lanes;
  Enlarged(const Axis<T>& along, int64_t channels, const T* y_end, Scratch& scratch)
      : along_(along),
        channels_(channels),
        y_end_(y_end),
        copy_(scratch.take<T>(copied(along))) {
    std::memset(copy_, 0, static_cast<size_t>(copied(along)) * sizeof(T));
  }
  static int64_t bytes(const Axis<T>& along) { return Scratch::bytes<T>(copied(along)); }

  // `to` has room for a whole vector behind the row.
  void enlarge(const T* row, T* to) const {
    const int64_t n = along_.size(), from = along_.from();
    if constexpr (pixel == Pixel::channels) {
      for_each_vector<T>(channels_, [&](int64_t c, int64_t count) {
        int64_t at = -1;
        Vec<T> here, after;
        for (int64_t d = 0; d < n; ++d) {
          const int64_t i = along_.lower(d);
          if (i != at) {
            here = i == at + 1 && at >= 0 ? after : load(row + i * channels_ + c, count);
            after = load(row + least(i + 1, from - 1) * channels_ + c, count);
            at = i;
          }
          const Vec<T> w(along_.weight(d)), rest(1 - along_.weight(d));
          store(fma(w, after, rest * here), to + d * channels_ + c, count);
        }
      });
    } else {
      if (pixel == Pixel::permuted && row + from + lanes > y_end_)  // no whole vector may be read at its end
        row = static_cast<const T*>(std::memcpy(copy_, row, static_cast<size_t>(from) * sizeof(T)));
      for (int64_t d = 0; d < n; d += lanes) along_.template blend<pixel == Pixel::permuted>(row, d).store(to + d);
    }
  }

  // gy = the transpose of enlarge(), of a whole row that has a readable zero on both sides.
  void transpose(const T* __restrict wide, T* __restrict gy) const {
    const int64_t n = along_.size(), from = along_.from();
    if constexpr (pixel == Pixel::channels) {
      for_each_vector<T>(channels_, [&](int64_t c, int64_t count) {
        const auto put = [&](int64_t i, Vec<T> v) { store(v, gy + i * channels_ + c, count); };
        add_up(Vec<T>(T(0)), [&](int64_t d) { return load(wide + d * channels_ + c, count); }, put);
      });
    } else if (n == 2 * from) {
      for (int64_t i = 0; i < from; ++i)
        gy[i] = T(0.25) * (wide[2 * i - 1] + wide[2 * i + 2]) + T(0.75) * (wide[2 * i] + wide[2 * i + 1]);
      gy[0] += T(0.25) * wide[0];
      gy[from - 1] += T(0.25) * wide[n - 1];
    } else {
      add_up(T(0), [&](int64_t d) { return wide[d]; }, [&](int64_t i, T v) { gy[i] = v; });
    }
  }

 private:
  static int64_t copied(const Axis<T>& along) { return pixel == Pixel::permuted ? along.from() + lanes : 0; }

  // put(i, what the positions of x give to position i of y), for all i in order.
  template <class V, class Get, class Put>
  void add_up(V zero, const Get& get, const Put& put) const {
    V here = zero, after = zero;
    int64_t i = 0;
    for (int64_t d = 0; d < along_.size(); ++d) {
      for (; i < along_.lower(d); ++i) put(i, here), here = after, after = zero;
      const V v = get(d);
      here = here + V(1 - along_.weight(d)) * v;
      after = after + V(along_.weight(d)) * v;
    }
    for (; i < along_.from() - 1; ++i) put(i, here), here = after, after = zero;
    put(i, here + after);  // beyond the last is the last
  }

  const Axis<T>& along_;
  int64_t channels_;
  const T* y_end_;
  T* copy_;  // of a row
};

// Two neighbouring rows of y, enlarged; going on to the next row makes one more.
template <class T, Pixel pixel>
class TwoRows {
 public:
  TwoRows(const T* y, const Axis<T>& down, const Enlarged<T, pixel>& enlarged, int64_t from, int64_t wide,
          Scratch& scratch)
      : y_(y),
        down_(down),
        enlarged_(enlarged),
        from_(from),
        here_(scratch.take<T>(wide)),
        after_(scratch.take<T>(wide)) {}

  void go_to(int64_t i) {
    if (i == row_) return;
    T* const old = here_;
    here_ = after_, after_ = old;
    if (row_ < 0 || i != row_ + 1) enlarged_.enlarge(y_ + i * from_, here_);
    enlarged_.enlarge(y_ + least(i + 1, down_.from() - 1) * from_, after_);
    row_ = i;
  }
  const T* here() const { return here_; }
  const T* after() const { return after_; }

 private:
  const T* y_;
  const Axis<T>& down_;
  const Enlarged<T, pixel>& enlarged_;
  int64_t from_;      // values in a row of y
  T *here_, *after_;  // rows row_ and row_ + 1 of y
  int64_t row_ = -1;
};

// Calls f(map, begin, end) for the parts of maps of `rows` rows in each task's range.
template <class F>
void for_each_part(int64_t maps, int64_t rows, int64_t work_per_row, const Parallel& parallel, const F& f) {
  parallel(maps * rows, grain_for(work_per_row), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % rows, last = least(rows, first + end - begin);
      f(begin / rows, first, last);
      begin += last - first;
    }
  });
}

template <class T, Pixel pixel, bool multiply>
void fuse_rows(const ScfmShape& shape, const Axis<T>& down, const Axis<T>& along, const T* x, const T* y, T* out,
               int64_t begin, int64_t end) {
  const int64_t row = shape.cols * shape.channels, from = shape.from_cols * shape.channels;
  const int64_t wide = row + Vec<T>::lanes;
  Scratch scratch(Enlarged<T, pixel>::bytes(along) + 2 * Scratch::bytes<T>(wide));
  const Enlarged<T, pixel> enlarged(along, shape.channels, y + shape.from_rows * from, scratch);
  TwoRows<T, pixel> rows(y, down, enlarged, from, wide, scratch);
  for (int64_t r = begin; r < end; ++r) {
    rows.go_to(down.lower(r));
    const T *here = rows.here(), *after = rows.after(), *x_row = x + r * row;
    T* const out_row = out + r * row;
    const Vec<T> w(down.weight(r)), rest(1 - down.weight(r));
    for_each_vector<T>(row, [&](int64_t k, int64_t n) {
      const Vec<T> v = load(x_row + k, n), up = fma(w, Vec<T>::load(after + k), rest * Vec<T>::load(here + k));
      store(multiply ? fma(v, up, v) : v + up, out_row + k, n);
    });
  }
}

// Calls f(r, count, lower) for the rows of x in [begin, end), two at a time where both lie between rows `lower` and
// lower + 1 of y. `count` is an integral constant, so that loops over it are unrolled.
template <class T, class F>
void for_each_pair(const Axis<T>& down, int64_t begin, int64_t end, const F& f) {
  for (int64_t r = begin; r < end;) {
    const int64_t i = down.lower(r);
    if (r + 1 < end && down.lower(r + 1) == i) {
      f(r, std::integral_constant<int, 2>(), i);
      r += 2;
    } else {
      f(r, std::integral_constant<int, 1>(), i);
      r += 1;
    }
  }
}

// Rows [begin, end) of gy of one map, and the rows of gx that lie below one of them.
template <class T, Pixel pixel, bool multiply>
void fuse_rows_backward(const ScfmShape& shape, const Axis<T>& down, const Axis<T>& along, const T* g, const T* x,
                        const T* y, T* gx, T* gy, int64_t begin, int64_t end) {
  const int64_t row = shape.cols * shape.channels, from = shape.from_cols * shape.channels;
  const int64_t wide = row + Vec<T>::lanes, border = 1, bordered = wide + 2 * border;
  Scratch scratch(Enlarged<T, pixel>::bytes(along) + 2 * Scratch::bytes<T>(wide) + 2 * Scratch::bytes<T>(bordered));
  const Enlarged<T, pixel> enlarged(along, shape.channels, y + shape.from_rows * from, scratch);
  TwoRows<T, pixel> rows(y, down, enlarged, from, wide, scratch);
  T *here = scratch.take<T>(bordered) + border, *after = scratch.take<T>(bordered) + border;
  std::memset(here - border, 0, static_cast<size_t>(bordered) * sizeof(T));
  std::memset(after - border, 0, static_cast<size_t>(bordered) * sizeof(T));
  int64_t current = most(0, begin - 1);  // the row of y that `here` belongs to
  bool fresh = true;                     // nothing has been added to `after`
  const auto finish = [&] {
    if (fresh) std::memset(after, 0, static_cast<size_t>(row) * sizeof(T));
    if (current >= begin) enlarged.transpose(here, gy + current * from);
    T* const done = here;
    here = after, after = done, fresh = true;
    ++current;
  };
  for_each_pair(down, down.first(current), down.first(end), [&](int64_t r, auto count, int64_t i) {
    while (current < i) finish();
    const bool mine = multiply && i >= begin;
    if (mine) rows.go_to(i);
    Vec<T> w[count], rest[count], lower[count], upper[count];
    for (int j = 0; j < count; ++j) {
      const T weight = down.weight(r + j), below = i == down.from() - 1 ? T(0) : weight;  // beyond the last is the last
      w[j] = Vec<T>(weight), rest[j] = Vec<T>(1 - weight), lower[j] = Vec<T>(1 - below), upper[j] = Vec<T>(below);
    }
    const auto add = [&](auto with_gx, auto first) {
      const T *a = rows.here(), *b = rows.after();
      for_each_vector<T>(row, [&](int64_t k, int64_t n) {
        Vec<T> h = load(here + k, n), t = first ? Vec<T>(T(0)) : load(after + k, n), up_here, up_after;
        if constexpr (with_gx) up_here = Vec<T>::load(a + k), up_after = Vec<T>::load(b + k);
        for (int j = 0; j < count; ++j) {
          const int64_t at = (r + j) * row + k;
          Vec<T> v = load(g + at, n);
          if constexpr (with_gx) store(fma(v, fma(w[j], up_after, rest[j] * up_here), v), gx + at, n);
          if constexpr (multiply) v = v * load(x + at, n);
          h = fma(lower[j], v, h), t = fma(upper[j], v, t);
        }
        store(h, here + k, n), store(t, after + k, n);
      });
    };
    const auto add_to = [&](auto first) {
      mine ? add(std::bool_constant<multiply>(), first) : add(std::false_type(), first);
    };
    fresh ? add_to(std::true_type()) : add_to(std::false_type());
    fresh = false;
  });
  while (current < end) finish();
}

// Calls f(integral constant of the kind of pixel, true_type or false_type for multiply).
template <class T, class F>
void for_kind(const ScfmShape& shape, const Axis<T>& along, const F& f) {
  const auto with = [&](auto pixel) { shape.multiply ? f(pixel, std::true_type()) : f(pixel, std::false_type()); };
  if (shape.channels > 1)
    with(std::integral_constant<Pixel, Pixel::channels>());
  else if (along.permutes())
    with(std::integral_constant<Pixel, Pixel::permuted>());
  else
    with(std::integral_constant<Pixel, Pixel::gathered>());
}

template <class T>
void scfm(const ScfmShape& shape, const T* x, const T* y, T* out, const Parallel& parallel) {
  const Axis<T> down(shape.rows, shape.from_rows), along(shape.cols, shape.from_cols);
  const int64_t row = shape.cols * shape.channels, from = shape.from_cols * shape.channels;
  for_each_part(shape.maps, shape.rows, 4 * row, parallel, [&](int64_t map, int64_t begin, int64_t end) {
    for_kind(shape, along, [&](auto pixel, auto multiply) {
      const int64_t large = map * shape.rows * row, small = map * shape.from_rows * from;
      fuse_rows<T, pixel, multiply>(shape, down, along, x + large, y + small, out + large, begin, end);
    });
  });
}

template <class T>
void scfm_backward(const ScfmShape& shape, const T* g, const T* x, const T* y, T* gx, T* gy, const Parallel& parallel) {
  const Axis<T> down(shape.rows, shape.from_rows), along(shape.cols, shape.from_cols);
  const int64_t row = shape.cols * shape.channels, from = shape.from_cols * shape.channels;
  const int64_t work = 8 * row * (1 + shape.rows / shape.from_rows);
  for_each_part(shape.maps, shape.from_rows, work, parallel, [&](int64_t map, int64_t begin, int64_t end) {
    for_kind(shape, along, [&](auto pixel, auto multiply) {
      const int64_t large = map * shape.rows * row, small = map * shape.from_rows * from;
      fuse_rows_backward<T, pixel, multiply>(shape, down, along, g + large, x + large, y + small,
                                             multiply ? gx + large : nullptr, gy + small, begin, end);
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
