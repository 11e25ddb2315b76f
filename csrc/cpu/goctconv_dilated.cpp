// The dilated bank of the cross-stage fusion (CSNet section 3.2): per scale, parallel dense 3×3 convolutions of the
// same input at several dilations, concatenated.
//
//   y[branch d] = W_d *_d x
//
// A task stages a band of input rows once, padded by the largest dilation, and every branch reads it there. The
// gradient to the input sums all branches in one pass: each is nine shifted taps per output channel of its own.
#include "cpu/table.h"
#include "cpu/taps.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

inline Step step_of(const DilatedShape& shape, int s, int d) {
  return step_on(shape.dilation[d], shape.in.rows(s), shape.in.cols(s));
}

inline Step widest(const DilatedShape& shape, int s) {  // padding: the largest dilation that is present
  Step pad{1, 1};
  for (int d = 0; d < shape.dilations; ++d) {
    const Step step = shape.branch[s][d] > 0 ? step_of(shape, s, d) : pad;
    pad = {most(pad.y, step.y), most(pad.x, step.x)};
  }
  return pad;
}

// One scale's bands. `Source` is the side that is staged: the input (forward), the gradient (backward).
template <class T>
struct Bands {
  Step pad;
  int64_t channels, rows_total, cols, batch, rows;
  Bands(const DilatedShape& shape, const Pyramid& source, int s, int64_t other_channels)
      : pad(widest(shape, s)),
        channels(source.channels[s]),
        rows_total(source.rows(s)),
        cols(source.cols(s)),
        batch(source.batch) {
    const int64_t bytes = static_cast<int64_t>(sizeof(T));
    const int64_t per_row = (channels * (cols + 2 * pad.x) + other_channels * cols) * bytes;
    rows = band_rows(rows_total, per_row, batch, pad.y);  // the halo is at most twice as tall as the band
  }
  int64_t per_sample() const { return (rows_total + rows - 1) / rows; }
  int64_t count() const { return batch * per_sample(); }
  int64_t sample(int64_t i) const { return i / per_sample(); }
  int64_t first(int64_t i) const { return i % per_sample() * rows; }
  int64_t height(int64_t i) const { return least(rows, rows_total - first(i)); }
};

template <class T>
PooledMap<T> whole_map(const T* data, const Pyramid& p, int s, int64_t b) {
  return {data + b * p.channels[s] * p.area(s), p.channels[s], p.rows(s), p.cols(s), 1, false};
}

template <class T>
void dilated(const DilatedShape& shape, const T* const* xs, const T* const* weights, const T* bias, const T* slope,
             T* const* ys, const Parallel& parallel) {
  for (int s = 0; s < shape.in.scales; ++s) {
    const int64_t outs = shape.out.channels[s], o_s = shape.out.begin(s), area = shape.out.area(s);
    if (outs == 0 || shape.out.batch == 0) continue;
    const Bands<T> bands(shape, shape.in, s, 0);
    const int64_t n_taps = bands.channels * 9;
    const Heap<T> packed(outs * n_taps);
    int64_t first[max_dilations + 1] = {};
    for (int d = 0; d < shape.dilations; ++d) {
      first[d + 1] = first[d] + shape.branch[s][d];
      const T* w = weights[s] + first[d] * n_taps;
      pack_weights(shape.branch[s][d], n_taps, packed.data() + first[d] * n_taps,
                   [&](int64_t o, int64_t t) { return w[o * n_taps + t]; });
    }
    parallel(bands.count(), grain_for(outs * n_taps * bands.rows * bands.cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = bands.sample(i), y0 = bands.first(i), rows = bands.height(i);
        const PooledMap<T> map = whole_map(xs[s], shape.in, s, b);
        const Taps<T, PooledMap<T>> source(&map, 1, bands.pad, bands.cols, true);
        Scratch scratch(Scratch::bytes<T>(source.buffer(rows)) + Scratch::bytes<const T*>(n_taps));
        T* buffer = scratch.take<T>(source.buffer(rows));
        const T** taps = scratch.take<const T*>(n_taps);
        source.stage(y0, rows, buffer, nullptr);
        for (int64_t r = 0; r < rows; ++r)
          for (int d = 0; d < shape.dilations; ++d) {
            if (shape.branch[s][d] == 0) continue;
            source.point(y0, rows, r, buffer, 3, step_of(shape, s, d), taps);
            const int64_t o = first[d];
            conv_row(
                RowConv<T>{taps, n_taps, packed.data() + o * n_taps, shape.branch[s][d],
                           ys[s] + (b * outs + o) * area + (y0 + r) * bands.cols, area, nullptr, 0,
                           bias == nullptr ? nullptr : bias + o_s + o, slope == nullptr ? nullptr : slope + o_s + o},
                bands.cols);
          }
      }
    });
  }
}

template <class T>
void dilated_grad_input(const DilatedShape& shape, const T* const* gys, const T* const* weights, T* const* gxs,
                        const Parallel& parallel) {
  for (int s = 0; s < shape.in.scales; ++s) {
    const int64_t channels = shape.in.channels[s], area = shape.in.area(s);
    if (channels == 0 || shape.in.batch == 0) continue;
    const Bands<T> bands(shape, shape.out, s, 0);
    const int64_t outs = bands.channels, n_taps = outs * 9;
    const Heap<T> packed(channels * n_taps);
    pack_weights(channels, n_taps, packed.data(),
                 [&](int64_t c, int64_t t) { return weights[s][(t / 9 * channels + c) * 9 + 8 - t % 9]; });
    parallel(bands.count(), grain_for(channels * n_taps * bands.rows * bands.cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = bands.sample(i), y0 = bands.first(i), rows = bands.height(i);
        const PooledMap<T> map = whole_map(gys[s], shape.out, s, b);
        const Taps<T, PooledMap<T>> source(&map, 1, bands.pad, bands.cols, true);
        Scratch scratch(Scratch::bytes<T>(source.buffer(rows)) + Scratch::bytes<const T*>(n_taps));
        T* buffer = scratch.take<T>(source.buffer(rows));
        const T** taps = scratch.take<const T*>(n_taps);
        source.stage(y0, rows, buffer, nullptr);
        for (int64_t r = 0; r < rows; ++r) {
          const T** next = taps;
          int64_t o = 0;
          for (int d = 0; d < shape.dilations; ++d)
            for (int64_t k = 0; k < shape.branch[s][d]; ++k, ++o) {
              next = source.point_channel(o, rows, r, buffer, 3, step_of(shape, s, d), next);
            }
          conv_row(RowConv<T>{taps, n_taps, packed.data(), channels,
                              gxs[s] + b * channels * area + (y0 + r) * bands.cols, area, nullptr, 0, nullptr, nullptr},
                   bands.cols);
        }
      }
    });
  }
}

template <class T>
void dilated_grad_weight(const DilatedShape& shape, const T* const* gys, const T* const* xs, T* const* gweights,
                         const Parallel& parallel) {
  for (int s = 0; s < shape.in.scales; ++s) {
    const int64_t outs = shape.out.channels[s], area = shape.out.area(s);
    const Bands<T> bands(shape, shape.in, s, outs);
    const int64_t n_taps = bands.channels * 9, work = outs * n_taps * bands.rows * bands.cols;
    sum_in_parts(bands.count(), work, outs * n_taps, gweights[s], parallel, [&](int64_t begin, int64_t end, T* sums) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = bands.sample(i), y0 = bands.first(i), rows = bands.height(i);
        const PooledMap<T> map = whole_map(xs[s], shape.in, s, b);
        const Taps<T, PooledMap<T>> source(&map, 1, bands.pad, bands.cols, true);
        Scratch scratch(Scratch::bytes<T>(source.buffer(rows)) + Scratch::bytes<const T*>(n_taps) +
                        Scratch::bytes<const T*>(outs));
        T* buffer = scratch.take<T>(source.buffer(rows));
        const T** taps = scratch.take<const T*>(n_taps);
        const T** grads = scratch.take<const T*>(outs);
        source.stage(y0, rows, buffer, nullptr);
        for (int64_t o = 0; o < outs; ++o) grads[o] = gys[s] + (b * outs + o) * area + y0 * bands.cols;
        int64_t o = 0;
        for (int d = 0; d < shape.dilations; o += shape.branch[s][d], ++d) {
          if (shape.branch[s][d] == 0) continue;
          source.point(y0, rows, 0, buffer, 3, step_of(shape, s, d), taps);
          grad_rows(RowsGrad<T>{grads + o, taps, shape.branch[s][d], n_taps, bands.cols, source.pitch(), rows,
                                bands.cols, sums + o * n_taps, n_taps});
        }
      }
    });
  }
}

}  // namespace

template <class T>
void add_goctconv_dilated(Kernels<T>& table) {
  table.dilated = dilated<T>;
  table.dilated_grad_input = dilated_grad_input<T>;
  table.dilated_grad_weight = dilated_grad_weight<T>;
}
SODFAST_INSTANTIATE(add_goctconv_dilated)

}  // namespace SODFAST_ISA
}  // namespace sodfast
