// Depthwise 3×3 of every scale (the simplified gOctConv of an ILBlock) and its weight gradient.
//
//   y[c][y][x] = Σ_{ky,kx} w[c][ky][kx] · x[c][y + d(ky-1)][x + d(kx-1)]         d: dilation, zeros outside
//
// Nine multiply-adds per element against one read and one write: the nine weights stay in registers, and the
// 2d + 1 rows in use stay in L1 as zero-padded lines, each copied once. The gradient to the input is the same
// with the kernel turned around.
#include "cpu/table.h"
#include "cpu/taps.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

inline Step step_of(const DepthwiseShape& shape, int s) {
  return step_on(shape.dilation, shape.maps.rows(s), shape.maps.cols(s));
}

// The 2d + 1 newest rows of a plane, zero-padded by d; rows outside the plane are zeros.
template <class T>
class PaddedLines {
 public:
  PaddedLines(const T* plane, int64_t rows, int64_t cols, Step step, T* buffer)
      : plane_(plane),
        rows_(rows),
        cols_(cols),
        pad_(step),
        buffer_(buffer) {
    std::memset(buffer, 0, items(cols, step) * sizeof(T));
  }
  static int64_t items(int64_t cols, Step step) { return (2 * step.y + 2) * (cols + 2 * step.x); }

  void load(int64_t y) const {
    if (y >= 0 && y < rows_) std::memcpy(slot(y) + pad_.x, plane_ + y * cols_, cols_ * sizeof(T));
  }
  const T* row(int64_t y) const {  // position 0 is column -d
    return y < 0 || y >= rows_ ? buffer_ + (2 * pad_.y + 1) * (cols_ + 2 * pad_.x) : slot(y);
  }

 private:
  T* slot(int64_t y) const { return buffer_ + y % (2 * pad_.y + 1) * (cols_ + 2 * pad_.x); }
  const T* plane_;
  int64_t rows_, cols_;
  Step pad_;
  T* buffer_;
};

template <class T>
void plane_rows(const T* x, int64_t rows, int64_t cols, Step d, const T* w, bool flip, T bias, T slope, T* y,
                int64_t y0, int64_t y1, T* buffer) {
  const PaddedLines<T> lines(x, rows, cols, d, buffer);
  const auto at = [&](int i) { return Vec<T>(flip ? w[8 - i] : w[i]); };
  const Vec<T> w0 = at(0), w1 = at(1), w2 = at(2), w3 = at(3), w4 = at(4), w5 = at(5), w6 = at(6), w7 = at(7),
               w8 = at(8);
  const Vec<T> b(bias), s(slope);
  for (int64_t r = y0 - d.y; r < y0 + d.y; ++r) lines.load(r);
  for (int64_t r = y0; r < y1; ++r) {
    lines.load(r + d.y);
    const T *above = lines.row(r - d.y), *here = lines.row(r), *below = lines.row(r + d.y);
    T* out = y + r * cols;
    for_each_vector<T>(cols, [&](int64_t i, int64_t n) {
      Vec<T> u = fma(w0, load(above + i, n), b), v = w3 * load(here + i, n), z = w6 * load(below + i, n);
      u = fma(w1, load(above + i + d.x, n), u), v = fma(w4, load(here + i + d.x, n), v),
      z = fma(w7, load(below + i + d.x, n), z);
      u = fma(w2, load(above + i + 2 * d.x, n), u), v = fma(w5, load(here + i + 2 * d.x, n), v);
      z = fma(w8, load(below + i + 2 * d.x, n), z);
      store(prelu(u + v + z, s), out + i, n);
    });
  }
}

template <class T>
void depthwise(const DepthwiseShape& shape, const T* const* xs, const T* weight, const T* bias, const T* slope,
               bool flip, T* const* ys, const Parallel& parallel) {
  const Pyramid& maps = shape.maps;
  for (int s = 0; s < maps.scales; ++s) {
    const Step d = step_of(shape, s);
    const int64_t channels = maps.channels[s], rows = maps.rows(s), cols = maps.cols(s), c0 = maps.begin(s);
    const int64_t planes = maps.batch * channels;
    const int64_t parts = planes == 0 || planes >= tasks_wanted ? 1 : least(rows, (tasks_wanted + planes - 1) / planes);
    parallel(planes * parts, grain_for(9 * rows * cols / parts), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes<T>(PaddedLines<T>::items(cols, d)));
      T* buffer = scratch.take<T>(PaddedLines<T>::items(cols, d));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / parts, part = i % parts, c = c0 + plane % channels;
        plane_rows(xs[s] + plane * rows * cols, rows, cols, d, weight + 9 * c, flip, bias == nullptr ? T(0) : bias[c],
                   slope == nullptr ? T(1) : slope[c], ys[s] + plane * rows * cols, part * rows / parts,
                   (part + 1) * rows / parts, buffer);
      }
    });
  }
}

// One channel over the batch; rows are summed in float lanes, groups of rows in double.
template <class T>
void channel_grad(const T* gy, const T* x, int64_t batch, int64_t stride, int64_t rows, int64_t cols, Step d, T* grad,
                  T* buffer) {
  constexpr int64_t group = 8;
  double total[9] = {};
  for (int64_t b = 0; b < batch; ++b) {
    const PaddedLines<T> lines(x + b * stride, rows, cols, d, buffer);
    for (int64_t r = -d.y; r < d.y; ++r) lines.load(r);
    for (int64_t r0 = 0; r0 < rows; r0 += group) {
      Vec<T> sums[9];
      for (auto& v : sums) v = Vec<T>(T(0));
      for (int64_t r = r0; r < rows && r < r0 + group; ++r) {
        lines.load(r + d.y);
        const T* in[3] = {lines.row(r - d.y), lines.row(r), lines.row(r + d.y)};
        const T* g_row = gy + b * stride + r * cols;
        for_each_vector<T>(cols, [&](int64_t i, int64_t n) {
          const Vec<T> g = load(g_row + i, n);
#pragma GCC unroll 9
          for (int k = 0; k < 9; ++k) sums[k] = fma(g, load(in[k / 3] + i + k % 3 * d.x, n), sums[k]);
        });
      }
      for (int k = 0; k < 9; ++k) total[k] += static_cast<double>(sum(sums[k]));
    }
  }
  for (int k = 0; k < 9; ++k) grad[k] = static_cast<T>(total[k]);
}

template <class T>
void depthwise_grad_weight(const DepthwiseShape& shape, const T* const* gys, const T* const* xs, T* gweight,
                           const Parallel& parallel) {
  const Pyramid& maps = shape.maps;
  for (int s = 0; s < maps.scales; ++s) {
    const int64_t channels = maps.channels[s], area = maps.area(s);
    const Step d = step_of(shape, s);
    const int64_t items = PaddedLines<T>::items(maps.cols(s), d);
    parallel(channels, grain_for(9 * maps.batch * area), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes<T>(items));
      T* buffer = scratch.take<T>(items);
      for (int64_t c = begin; c < end; ++c)
        channel_grad(gys[s] + c * area, xs[s] + c * area, maps.batch, channels * area, maps.rows(s), maps.cols(s), d,
                     gweight + 9 * (maps.begin(s) + c), buffer);
    });
  }
}

}  // namespace

template <class T>
void add_goctconv_depthwise(Kernels<T>& table) {
  table.depthwise = depthwise<T>;
  table.depthwise_grad_weight = depthwise_grad_weight<T>;
}
SODFAST_INSTANTIATE(add_goctconv_depthwise)

}  // namespace SODFAST_ISA
}  // namespace sodfast
