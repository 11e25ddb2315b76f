// The boundary of soft maps, its gradient, and the sums of the structure polishing loss with theirs.
//
// Compute per element and direction: some 2⌈log₂ k⌉ + 4 maxima, and as many selections on the way back, against one
// read and one write (way back: two reads, one write); the line buffers, 4k rows at most, stay in L2.
// Rows are the tasks: a range of them goes through its plane once, and begins k rows early (way back: 2k).
#include "cpu/boundary_rows.h"
#include "cpu/table.h"
#include "common/sigmoid.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// Calls f(plane, begin, end) for the parts of planes in each task's range of rows.
template <class F>
void for_each_part(const BoundaryShape& shape, int64_t work_per_row, const Parallel& parallel, const F& f) {
  if (shape.rows == 0 || shape.cols == 0) return;
  const int64_t grain = most(grain_for(work_per_row), 8 * shape.k);  // the rows before a range are extra work
  parallel(shape.planes * shape.rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t plane = begin / shape.rows, first = begin % shape.rows,
                    last = least(shape.rows, first + end - begin);
      f(plane, first, last);
      begin += last - first;
    }
  });
}

// Called when row y of the result is at hand: the row of the argument that will be wanted after the next.
template <class T>
void prefetch_ahead(const BoundaryShape& shape, const T* plane, int64_t y) {
  y += shape.k / 2 + 3;
  if (y < shape.rows) prefetch_row(plane + y * shape.cols, shape.cols);
}

template <class T>
void boundary(const BoundaryShape& shape, const T* z, T* out, const Parallel& parallel) {
  const LineShape line = LineShape::of<T>(shape.cols);
  for_each_part(shape, 16 * shape.cols, parallel, [&](int64_t plane, int64_t begin, int64_t end) {
    Scratch scratch(BoundaryRows<T>::bytes(shape, line));
    BoundaryRows<T> rows(shape, line, begin, scratch);
    const int64_t start = plane * shape.rows * shape.cols;
    const auto source = [&](int64_t y) { return z + start + y * shape.cols; };
    for (int64_t y = begin; y < end; ++y) {
      T* to = out + start + y * shape.cols;
      rows.row(y, source, [&](int64_t x, Vec<T> v) { store(v, to + x, least(Vec<T>::lanes, shape.cols - x)); });
    }
  });
}

template <class T>
void boundary_backward(const BoundaryShape& shape, const T* g, const T* z, T* gz, const Parallel& parallel) {
  const LineShape line = LineShape::of<T>(shape.cols);
  for_each_part(shape, 32 * shape.cols, parallel, [&](int64_t plane, int64_t begin, int64_t end) {
    Scratch scratch(BoundaryBack<T>::bytes(shape, line));
    BoundaryBack<T> rows(shape, line, begin, end, scratch);
    const int64_t start = plane * shape.rows * shape.cols;
    const auto grad = [&](int64_t y) {
      prefetch_ahead(shape, z + start, y);
      if (y + 2 < shape.rows) prefetch_row(g + start + (y + 2) * shape.cols, shape.cols);
      return g + start + y * shape.cols;
    };
    rows.run([&](int64_t y) { return z + start + y * shape.cols; }, grad,
             [&](int64_t y, int64_t x, int64_t count, Vec<T> v) { store(v, gz + start + y * shape.cols + x, count); });
  });
}

// ------------------------------------------------------------------------------- structure polishing
// The latest rows of sigmoid(logits), each made when it is first asked for.
template <class T>
class SigmoidRows {
 public:
  SigmoidRows(const T* logits, int64_t cols, LineShape line, int64_t first, int64_t number, Scratch& scratch)
      : logits_(logits),
        cols_(cols),
        pitch_(line.pitch),
        number_(number),
        next_(first),
        rows_(scratch.take<T>(number * line.pitch)) {}
  static int64_t bytes(LineShape line, int64_t number) { return Scratch::bytes<T>(number * line.pitch); }

  const T* operator()(int64_t y) {
    for (; next_ <= y; ++next_) {
      const T* from = logits_ + next_ * cols_;
      T* to = row(next_);
      for_each_vector<T>(cols_, [&](int64_t x, int64_t count) { sigmoid(load(from + x, count)).store(to + x); });
    }
    return row(y);
  }

 private:
  T* row(int64_t y) const { return rows_ + y % number_ * pitch_; }
  const T* logits_;
  int64_t cols_, pitch_, number_, next_;
  T* rows_;
};

// Adds up Σ p g, Σ p, Σ g of a row in the vector's lanes, then in float64.
template <class T>
struct RowSums {
  Vec<T> pg{T(0)}, p{T(0)}, g{T(0)};
  void add(Vec<T> a, Vec<T> b) { pg = fma(a, b, pg), p = p + a, g = g + b; }
  void write(double* to) const {
    to[0] = static_cast<double>(sum(pg)), to[1] = static_cast<double>(sum(p)), to[2] = static_cast<double>(sum(g));
  }
};

template <class T>
void structure_polishing_sums(const BoundaryShape& shape, const T* logits, const T* truth, T* sums,
                              const Parallel& parallel) {
  const LineShape line = LineShape::of<T>(shape.cols);
  const int64_t cols = shape.cols, ahead = shape.k / 2 + 3;
  // Six sums per row, added up in the order of rows: the result does not depend on who did which.
  Heap<double> row_sums(6 * shape.planes * shape.rows);
  for_each_part(shape, 48 * cols, parallel, [&](int64_t plane, int64_t begin, int64_t end) {
    const int64_t first = most(0, begin - shape.k / 2 - 1), start = plane * shape.rows * cols;
    Scratch scratch(2 * BoundaryRows<T>::bytes(shape, line) + SigmoidRows<T>::bytes(line, ahead) +
                    Scratch::bytes<T>(line.pitch));
    BoundaryRows<T> of_map(shape, line, begin, scratch), of_truth(shape, line, begin, scratch);
    SigmoidRows<T> map(logits + start, cols, line, first, ahead, scratch);
    T* truth_line = scratch.take<T>(line.pitch);
    const auto map_row = [&](int64_t y) { return map(y); };
    const auto truth_row = [&](int64_t y) { return truth + start + y * cols; };
    for (int64_t y = begin; y < end; ++y) {
      RowSums<T> whole, edge;
      prefetch_ahead(shape, logits + start, y), prefetch_ahead(shape, truth + start, y);
      of_truth.row(y, truth_row, [&](int64_t x, Vec<T> v) { v.store(truth_line + x); });
      of_map.row(y, map_row, [&](int64_t x, Vec<T> v) {
        const int64_t count = least(Vec<T>::lanes, cols - x);
        edge.add(where(first_lanes(count), v, Vec<T>(T(0))), load(truth_line + x, count));
      });
      const T *p = map(y), *g = truth_row(y);
      for_each_vector<T>(cols, [&](int64_t x, int64_t count) { whole.add(load(p + x, count), load(g + x, count)); });
      double* to = row_sums.data() + 6 * (plane * shape.rows + y);
      whole.write(to), edge.write(to + 3);
    }
  });
  for (int64_t plane = 0; plane < shape.planes; ++plane) {
    double total[6] = {};
    for (int64_t y = 0; y < shape.rows; ++y)
      for (int i = 0; i < 6; ++i) total[i] += row_sums.data()[6 * (plane * shape.rows + y) + i];
    for (int i = 0; i < 6; ++i) sums[6 * plane + i] = static_cast<T>(total[i]);
  }
}

template <class T>
void structure_polishing_sums_backward(const BoundaryShape& shape, const T* g, const T* logits, const T* truth,
                                       T* glogits, const Parallel& parallel) {
  const LineShape line = LineShape::of<T>(shape.cols);
  const int64_t cols = shape.cols, behind = BoundaryBack<T>::rows_in_use(shape);
  for_each_part(shape, 96 * cols, parallel, [&](int64_t plane, int64_t begin, int64_t end) {
    Scratch scratch(BoundaryBack<T>::bytes(shape, line) + BoundaryRows<T>::bytes(shape, line) +
                    SigmoidRows<T>::bytes(line, behind) + Scratch::bytes<T>(line.pitch));
    const int64_t start = plane * shape.rows * cols;
    BoundaryBack<T> back(shape, line, begin, end, scratch);
    BoundaryRows<T> of_truth(shape, line, back.first_window(), scratch);
    SigmoidRows<T> map(logits + start, cols, line, most(0, back.first_window() - shape.k / 2 - 1), behind, scratch);
    T* grad_line = scratch.take<T>(line.pitch);
    const T* weights = g + 6 * plane;  // of the six sums
    const Vec<T> whole_pg(weights[0]), whole_p(weights[1]), edge_pg(weights[3]), edge_p(weights[4]), one(T(1));
    const auto map_row = [&](int64_t y) { return map(y); };
    const auto truth_row = [&](int64_t y) { return truth + start + y * cols; };
    const auto edge_grad = [&](int64_t y) {
      prefetch_ahead(shape, logits + start, y), prefetch_ahead(shape, truth + start, y);
      of_truth.row(y, truth_row, [&](int64_t x, Vec<T> v) { fma(edge_pg, v, edge_p).store(grad_line + x); });
      return grad_line;
    };
    back.run(map_row, edge_grad, [&](int64_t y, int64_t x, int64_t count, Vec<T> edge) {
      const Vec<T> p = load(map(y) + x, count), t = load(truth_row(y) + x, count);
      store((edge + fma(whole_pg, t, whole_p)) * (p * (one - p)), glogits + start + y * cols + x, count);
    });
  });
}

}  // namespace

template <class T>
void add_boundary(Kernels<T>& table) {
  table.boundary = boundary<T>;
  table.boundary_backward = boundary_backward<T>;
  table.structure_polishing_sums = structure_polishing_sums<T>;
  table.structure_polishing_sums_backward = structure_polishing_sums_backward<T>;
}
SODFAST_INSTANTIATE(add_boundary)

}  // namespace SODFAST_ISA
}  // namespace sodfast
