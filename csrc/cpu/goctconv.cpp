// Cross-scale convolution (gOctConv, CSNet section 3.1) and its gradients.
//
//   y_j = Σ_{i<=j} W_ji * pool(x_i)  +  Σ_{i>j} up(W_ji * x_i)        pool: max 2^(j-i), up: bilinear 2^(i-j)
//
// A task computes a band of rows of one output scale of one sample. The finer inputs are pooled row by row into line
// buffers and become ordinary input channels (their weight slices are neighbours, since scales are stored high
// resolution first); the coarser inputs are convolved at their own size, and their result is upsampled row by row as
// the value from which the accumulators start. Nothing but the output is written to memory.
//
// The gradient to the input is the same machine: the transpose of `up` takes the place of pool, the way back through
// max-pool that of `up`, and the weights are transposed and turned.
//
// Per output pixel and channel: in·k² multiply-adds; reads every input once per band (a few rows twice at k = 3).
#include <type_traits>

#include "cpu/table.h"
#include "cpu/taps.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

// The direction a convolution runs in; everything that differs between forward and gradient to the input.
template <class T>
struct Forward {
  using Map = PooledMap<T>;
  const GOctConvShape& shape;
  const T* const* xs;
  const T* weight;
  const Pyramid& from() const { return shape.in; }
  const Pyramid& to() const { return shape.out; }
  Map map(int i, int s, int64_t b) const {  // source scale i as scale s >= i sees it
    const Pyramid& in = shape.in;
    return {xs[i] + b * in.channels[i] * in.area(i),
            in.channels[i],
            in.rows(i),
            in.cols(i),
            int64_t(1) << (s - i),
            shape.stride == 2};
  }
  T weight_at(int64_t o, int64_t c, int64_t position) const {
    const int64_t k2 = shape.kernel * shape.kernel;
    return weight[(o * shape.in.total() + c) * k2 + position];
  }
};

template <class T>
struct Backward {
  using Map = GradientMap<T>;
  const GOctConvShape& shape;
  const T* const* gys;
  const T* const* xs;
  const T* weight;
  const Pyramid& from() const { return shape.out; }
  const Pyramid& to() const { return shape.in; }
  Map map(int j, int s, int64_t b) const {
    const Pyramid& out = shape.out;
    return {gys[j] + b * out.channels[j] * out.area(j), out.channels[j], out.rows(j), out.cols(j),
            int64_t(1) << (s - j)};
  }
  T weight_at(int64_t c, int64_t o, int64_t position) const {
    const int64_t k2 = shape.kernel * shape.kernel;
    return weight[(o * shape.in.total() + c) * k2 + (k2 - 1 - position)];
  }
};

// What scale s of the target needs: its own taps, and the coarser sources with their results at their own size.
template <class T, class Direction>
class ScaleTask {
 public:
  using Map = typename Direction::Map;
  ScaleTask(const Direction& d, int s, int64_t height, int64_t width)
      : d_(d),
        s_(s),
        outs_(d.to().channels[s]),
        height_(height),
        width_(width),
        k2_(d.shape.kernel * d.shape.kernel) {
    const Pyramid& from = d.from();
    fine_ = s + 1 < from.scales ? s + 1 : from.scales;
    for (int i = s + 1; i < from.scales; ++i)
      if (from.channels[i] > 0) coarse_[n_coarse_++] = i;
    fine_channels_ = from.begin(fine_);
    for (int m = 0; m < n_coarse_; ++m) coarse_channels_ = most(coarse_channels_, from.channels[coarse_[m]]);
    // Bands start at multiples of 8, so that no pooling window is cut.
    const int64_t per_row = fine_channels_ * (width + 2) + n_coarse_ * (outs_ + coarse_channels_) * width / 4;
    rows_ = band_rows(height, per_row * static_cast<int64_t>(sizeof(T)), from.batch, 8);
  }

  int64_t packed_size() const {
    int64_t n = outs_ * fine_channels_ * k2_;
    for (int m = 0; m < n_coarse_; ++m) n += outs_ * d_.from().channels[coarse_[m]] * k2_;
    return n;
  }
  void pack(T* dst) {
    const int64_t o0 = d_.to().begin(s_);
    packed_fine_ = dst;
    pack_from(0, fine_channels_, o0, dst);
    dst += outs_ * fine_channels_ * k2_;
    for (int m = 0; m < n_coarse_; ++m) {
      packed_coarse_[m] = dst;
      pack_from(d_.from().begin(coarse_[m]), d_.from().channels[coarse_[m]], o0, dst);
      dst += outs_ * d_.from().channels[coarse_[m]] * k2_;
    }
  }

  int64_t bands() const { return (height_ + rows_ - 1) / rows_; }
  // Computes band `band` of sample b; emit(y, row, stride) is given each finished row when `line` is asked for,
  // otherwise rows are written to out.
  template <class Emit>
  void run(int64_t b, int64_t band, T* out, const T* bias, const T* slope, const Emit* emit) const {
    const int64_t y0 = band * rows_, rows = least(rows_, height_ - y0), kernel = d_.shape.kernel;
    Map maps[max_scales];
    for (int i = 0; i < fine_; ++i) maps[i] = d_.map(i, s_, b);
    const Taps<T, Map> fine(maps, fine_, {kernel / 2, kernel / 2}, width_, false);

    const int64_t most_taps = most(fine_channels_, coarse_channels_) * k2_;
    const int64_t line_items = 2 * d_.from().cols(0) + 3 * d_.shape.in.cols(0) + 64;
    int64_t low_items = 0, low_buffer = 0;
    for (int m = 0; m < n_coarse_; ++m) {
      const int64_t factor = int64_t(1) << (coarse_[m] - s_), n = rows / factor + 2;
      low_items += outs_ * n * (width_ / factor);
      low_buffer = most(low_buffer, d_.from().channels[coarse_[m]] * (n + 2) * (width_ / factor + 2));
    }
    const bool start = n_coarse_ > 0, lines = emit != nullptr;
    const int64_t group =
        start ? int64_t(1) << (coarse_[n_coarse_ - 1] - s_) : 1;  // rows of the coarsest source's pixel
    Scratch scratch(Scratch::bytes<T>(fine.buffer(rows)) + Scratch::bytes<const T*>(most_taps) +
                    Scratch::bytes<T>(line_items) + Scratch::bytes<T>(low_items) + Scratch::bytes<T>(low_buffer) +
                    Scratch::bytes<T>(start ? group * outs_ * width_ : 0) +
                    Scratch::bytes<T>(lines ? outs_ * width_ : 0));
    T* buffer = scratch.take<T>(fine.buffer(rows));
    const T** taps = scratch.take<const T*>(most_taps);
    T* line = scratch.take<T>(line_items);
    T* low = scratch.take<T>(low_items);
    T* staged_low = scratch.take<T>(low_buffer);
    T* start_rows = scratch.take<T>(start ? group * outs_ * width_ : 0);
    T* out_row = scratch.take<T>(lines ? outs_ * width_ : 0);

    Low lows[max_scales];
    for (int m = 0; m < n_coarse_; ++m) {
      lows[m] = coarse_rows(m, b, y0, rows, low, staged_low, line, taps);
      low += outs_ * lows[m].rows * lows[m].cols;
    }
    fine.stage(y0, rows, buffer, line);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = y0 + r;
      if (start && r % group == 0) start_from(lows, b, y, group, start_rows, line);
      fine.point(y0, rows, r, buffer, kernel, {1, 1}, taps);
      RowConv<T> conv{taps,
                      fine_channels_ * k2_,
                      packed_fine_,
                      outs_,
                      lines ? out_row : out + y * width_,
                      lines ? width_ : height_ * width_,
                      start ? start_rows + r % group * outs_ * width_ : nullptr,
                      width_,
                      bias,
                      slope};
      conv_row(conv, width_);
      if (lines) (*emit)(y, out_row, width_);
    }
  }

 private:
  struct Low {  // the convolution of a coarser source, rows [first, first + rows) of all output channels
    const T* data;
    int64_t first, rows, cols, height, factor;
    int scale;
    const T* row(int64_t o, int64_t y) const { return data + (o * rows + clamp_to(y, height) - first) * cols; }
  };

  void pack_from(int64_t c0, int64_t channels, int64_t o0, T* dst) const {
    pack_weights(outs_, channels * k2_, dst,
                 [&](int64_t o, int64_t t) { return d_.weight_at(o0 + o, c0 + t / k2_, t % k2_); });
  }

  Low coarse_rows(int m, int64_t b, int64_t y0, int64_t rows, T* low, T* staged, T* line, const T** taps) const {
    const int i = coarse_[m];
    const int64_t factor = int64_t(1) << (i - s_);
    const int64_t cols = width_ / factor, height = height_ / factor;
    const int64_t first = most(0, y0 / factor - 1);
    const int64_t last = least(height, (y0 + rows - 1) / factor + 2);
    const Map map = d_.map(i, i, b);
    const Taps<T, Map> source(&map, 1, {d_.shape.kernel / 2, d_.shape.kernel / 2}, cols, false);
    const int64_t n = last - first;
    source.stage(first, n, staged, line);
    for (int64_t r = 0; r < n; ++r) {
      source.point(first, n, r, staged, d_.shape.kernel, {1, 1}, taps);
      conv_row(RowConv<T>{taps, source.channels * k2_, packed_coarse_[m], outs_, low + r * cols, n * cols, nullptr, 0,
                          nullptr, nullptr},
               cols);
    }
    return {low, first, n, cols, height, factor, i};
  }

  // start[r][o] = what the coarser sources give to rows y + r, r < group.
  void start_from(const Low* lows, int64_t b, int64_t y, int64_t group, T* start, T* line) const {
    if constexpr (std::is_same_v<Direction, Forward<T>>) {
      for (int m = 0; m < n_coarse_; ++m)
        for (int64_t r = 0; r < group; ++r) {
          const Low& low = lows[m];
          const Between at = between(y + r, low.factor);
          for (int64_t o = 0; o < outs_; ++o)
            upsample_row(low.row(o, at.lower), low.row(o, at.lower + 1), static_cast<T>(at.upper), low.factor,
                         start + (r * outs_ + o) * width_, low.cols, line, m > 0);
        }
    } else {
      std::memset(start, 0, group * outs_ * width_ * sizeof(T));
      const Pyramid& in = d_.shape.in;
      for (int m = 0; m < n_coarse_; ++m) {
        const Low& low = lows[m];
        const PooledMap<T> x{d_.xs[s_] + b * in.channels[s_] * in.area(s_),
                             in.channels[s_],
                             in.rows(s_),
                             in.cols(s_),
                             low.factor,
                             d_.shape.stride == 2};
        for (int64_t r = 0; r < group; r += low.factor)
          for (int64_t o = 0; o < outs_; ++o)
            x.unpool_add(o, (y + r) / low.factor, low.row(o, (y + r) / low.factor), start + (r * outs_ + o) * width_,
                         outs_ * width_, line);
      }
    }
  }

  const Direction& d_;
  int s_;
  int64_t outs_, height_, width_, k2_;
  int fine_ = 0, n_coarse_ = 0, coarse_[max_scales] = {};
  int64_t fine_channels_ = 0, coarse_channels_ = 0, rows_ = 8;
  const T* packed_fine_ = nullptr;
  const T* packed_coarse_[max_scales] = {};
};

template <class T>
struct NoEmit {
  void operator()(int64_t, const T*, int64_t) const {}
};

template <class T>
void forward(const GOctConvShape& shape, const T* const* xs, const T* weight, const T* bias, const T* slope,
             T* const* ys, const Parallel& parallel) {
  const Forward<T> direction{shape, xs, weight};
  const Pyramid& out = shape.out;
  for (int s = 0; s < out.scales; ++s) {
    const int64_t outs = out.channels[s], o0 = out.begin(s);
    if (outs == 0 || out.batch == 0) continue;
    ScaleTask<T, Forward<T>> task(direction, s, out.rows(s), out.cols(s));
    const Heap<T> packed(task.packed_size());
    task.pack(packed.data());
    const int64_t bands = task.bands(), work = task.packed_size() * out.area(s) / bands;
    parallel(out.batch * bands, grain_for(work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        task.run(i / bands, i % bands, ys[s] + i / bands * outs * out.area(s), bias == nullptr ? nullptr : bias + o0,
                 slope == nullptr ? nullptr : slope + o0, static_cast<const NoEmit<T>*>(nullptr));
    });
  }
}

// dst rows 2y and 2y + 1 = gradient of the 2×2 average pool; what an odd size cut off gets zero.
template <class T>
void spread_average(const T* gradient, int64_t n, T* row0, int64_t cols) {
  T* row1 = row0 + cols;
  for (int64_t x = 0; x < n; ++x) row0[2 * x] = row0[2 * x + 1] = row1[2 * x] = row1[2 * x + 1] = T(0.25) * gradient[x];
  for (int64_t x = 2 * n; x < cols; ++x) row0[x] = row1[x] = 0;
}

template <class T>
void grad_input(const GOctConvShape& shape, const T* const* gys, const T* const* xs, const T* weight, T* const* gxs,
                const Parallel& parallel) {
  const Backward<T> direction{shape, gys, xs, weight};
  const Pyramid &in = shape.in, &out = shape.out;
  for (int s = 0; s < in.scales; ++s) {
    const int64_t channels = in.channels[s], rows = in.rows(s), cols = in.cols(s);
    if (channels == 0 || in.batch == 0) continue;
    ScaleTask<T, Backward<T>> task(direction, s, out.rows(s), out.cols(s));
    const Heap<T> packed(task.packed_size());
    task.pack(packed.data());
    const int64_t bands = task.bands(), work = task.packed_size() * out.area(s) / bands;
    parallel(in.batch * bands, grain_for(work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* plane = gxs[s] + i / bands * channels * rows * cols;
        const auto spread = [&](int64_t y, const T* row, int64_t stride) {
          for (int64_t c = 0; c < channels; ++c) {
            T* dst = plane + c * rows * cols + 2 * y * cols;
            spread_average(row + c * stride, out.cols(s), dst, cols);
            if (y + 1 == out.rows(s) && rows % 2 == 1) std::memset(dst + 2 * cols, 0, cols * sizeof(T));
          }
        };
        task.run(i / bands, i % bands, plane, nullptr, nullptr, shape.stride == 2 ? &spread : nullptr);
      }
    });
  }
}

// Weight gradient. At each scale r the pairs (output j, input i) with max(i, j) = r meet: the gradient of a finer
// output comes down through the transpose of `up`, a finer input through the pooling.
template <class T>
void grad_weight(const GOctConvShape& shape, const T* const* gys, const T* const* xs, T* gweight,
                 const Parallel& parallel) {
  const Pyramid &in = shape.in, &out = shape.out;
  const int64_t kernel = shape.kernel, k2 = kernel * kernel, n_in = in.total();
  const int64_t n_weight = out.total() * n_in * k2;
  const Forward<T> pooled{shape, xs, nullptr};
  const Backward<T> lowered{shape, gys, xs, nullptr};
  const int scales = in.scales > out.scales ? in.scales : out.scales;
  int64_t band[max_scales], first_task[max_scales + 1] = {}, work = 0;
  for (int r = 0; r < scales; ++r) {
    const int64_t per_row = (in.total() + out.total()) * (out.cols(r) + 2) * static_cast<int64_t>(sizeof(T));
    band[r] = band_rows(out.rows(r), per_row, in.batch, 1);
    first_task[r + 1] = first_task[r] + in.batch * ((out.rows(r) + band[r] - 1) / band[r]);
    work += in.batch * out.area(r) * n_weight;
  }
  const int64_t tasks = first_task[scales];
  sum_in_parts(tasks, work / most(tasks, 1), n_weight, gweight, parallel, [&](int64_t begin, int64_t end, T* sums) {
    for (int64_t i = begin; i < end; ++i) {
      int r = 0;
      while (i >= first_task[r + 1]) ++r;
      const int64_t rows = out.rows(r), cols = out.cols(r), bands = (rows + band[r] - 1) / band[r];
      const int64_t b = (i - first_task[r]) / bands, y0 = (i - first_task[r]) % bands * band[r];
      const int64_t n = least(band[r], rows - y0);
      PooledMap<T> maps[max_scales];
      GradientMap<T> grads[max_scales];
      const int n_maps = static_cast<int>(least(r + 1, in.scales)),
                n_grads = static_cast<int>(least(r + 1, out.scales));
      for (int m = 0; m < n_maps; ++m) maps[m] = pooled.map(m, r, b);
      for (int m = 0; m < n_grads; ++m) grads[m] = lowered.map(m, r, b);
      const Taps<T, PooledMap<T>> x(maps, n_maps, {kernel / 2, kernel / 2}, cols, true);
      const Taps<T, GradientMap<T>> g(grads, n_grads, {0, 0}, cols, true);
      const int64_t line_items = 3 * in.cols(0) + 2 * out.cols(0) + 64;
      Scratch scratch(Scratch::bytes<T>(x.buffer(n)) + Scratch::bytes<T>(g.buffer(n)) + Scratch::bytes<T>(line_items) +
                      Scratch::bytes<const T*>(x.channels * k2) + Scratch::bytes<const T*>(g.channels));
      T* x_rows = scratch.take<T>(x.buffer(n));
      T* g_rows = scratch.take<T>(g.buffer(n));
      T* line = scratch.take<T>(line_items);
      const T** x_taps = scratch.take<const T*>(x.channels * k2);
      const T** g_taps = scratch.take<const T*>(g.channels);
      x.stage(y0, n, x_rows, line);
      g.stage(y0, n, g_rows, line);
      x.point(y0, n, 0, x_rows, kernel, {1, 1}, x_taps);
      g.point(y0, n, 0, g_rows, 1, {1, 1}, g_taps);
      // Output r with every input up to r, then the finer outputs with input r alone.
      const int64_t o_r = out.begin(r < out.scales ? r : out.scales), i_r = in.begin(r < in.scales ? r : in.scales);
      grad_rows(RowsGrad<T>{g_taps + o_r, x_taps, g.channels - o_r, x.channels * k2, cols, x.pitch(), n, cols,
                            sums + o_r * n_in * k2, n_in * k2});
      grad_rows(RowsGrad<T>{g_taps, x_taps + i_r * k2, o_r, (x.channels - i_r) * k2, cols, x.pitch(), n, cols,
                            sums + i_r * k2, n_in * k2});
    }
  });
}

}  // namespace

template <class T>
void add_goctconv(Kernels<T>& table) {
  table.goctconv = forward<T>;
  table.goctconv_grad_input = grad_input<T>;
  table.goctconv_grad_weight = grad_weight<T>;
}
SODFAST_INSTANTIATE(add_goctconv)

}  // namespace SODFAST_ISA
}  // namespace sodfast
