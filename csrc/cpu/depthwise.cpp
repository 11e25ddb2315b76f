// The first two layers of an inverted residual on dense maps: a 1×1 expansion, then a depthwise 3×3 or 5×5.
//
//   in → 1×1 to a few channels over a band of rows → [a buffer in L2] → per channel: zero-padded lines in L1 →
//   depthwise
//
// The expanded map, 4 to 6 times as large as the input, is never in memory. A task is a band of rows and a block of
// channels; only the few rows that two bands need are expanded twice, and most maps are one band. With stride 2 a line
// is kept as its even and its odd columns, so that every tap reads neighbours.
#include "cpu/maps.h"
#include "cpu/table.h"
#include "cpu/window.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

constexpr int64_t lanes = Vec<float>::lanes;
constexpr int64_t block = Tile::outs;        // channels of a task
constexpr int64_t buffer_bytes = 128 << 10;  // of expanded channels: within L2
constexpr int64_t line_bytes = 20 << 10;     // of padded lines: within L1
constexpr int most_rows_at_once = 6;         // accumulators, with 5 weights and an input: 12 of 16 registers or more

// Neighbouring output rows of one channel from padded lines.
template <int K, int S>
struct Lines {
  static constexpr int64_t pad = K / 2;
  int64_t cols, half, pitch;  // of the output; of a line: where the odd columns begin, and its length

  explicit Lines(int64_t out_cols) : cols(out_cols) {
    half = S == 2 ? (cols + pad + lanes - 1) / lanes * lanes : 0;
    pitch = S == 2 ? 2 * half : (cols + pad + lanes - 1) / lanes * lanes;
  }
  // Behind each row there are `pad` zeros at least, which are also those before the next.
  void fill(const float* in, float* line) const {
    if constexpr (S == 2) {
      pad_split_row(in, cols, line, half);
    } else {
      pad_row(in, cols, line, pitch);
    }
  }
  // Of tap kx from the line's beginning, at output column 0.
  int64_t offset(int kx) const {
    const int64_t d = kx - pad;
    return S == 1 ? d : (d & 1 ? half + (d - 1) / 2 : d / 2);
  }

  // R output rows; `line` is that of the first one's tap (0, centre).
  template <int R>
  void rows(const float* line, const float* weight, float bias, Activation activation, float* out) const {
    using V = Vec<float>;
    for (int64_t x = 0; x < cols; x += lanes) {
      V sum[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = V(bias);
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) {
        const float* p = line + offset(kx) + x;
        V w[K];
#pragma GCC unroll 8
        for (int ky = 0; ky < K; ++ky) w[ky] = V(weight[ky * K + kx]);
#pragma GCC unroll 16
        for (int i = 0; i < S * (R - 1) + K; ++i) {
          V v = V::load(p + i * pitch);
          pin(v);
#pragma GCC unroll 8
          for (int ky = 0; ky < K; ++ky) {
            if ((i - ky) % S != 0 || i < ky || (i - ky) / S >= R) continue;
            sum[(i - ky) / S] = fma(w[ky], v, sum[(i - ky) / S]);
          }
        }
      }
      const int64_t n = least(lanes, cols - x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V y = activation == Activation::relu        ? relu(sum[r])
                    : activation == Activation::relu6     ? relu6(sum[r])
                    : activation == Activation::hardswish ? hardswish(sum[r])
                                                          : sum[r];
        store(y, out + r * cols + x, n);
      }
    }
  }
  // The same of `n` rows, at most R.
  template <int R, class... Rest>
  void some_rows(int64_t n, const Rest&... rest) const {
    if constexpr (R > 1) {
      if (n < R) return some_rows<R - 1>(n, rest...);
    }
    rows<R>(rest...);
  }
};

// Rows [begin, end) of one channel from `in`, of which row `first` is the first.
template <int K, int S>
void channel_rows(const DepthwiseStep& step, int64_t c, const float* in, int64_t first, int64_t in_rows, int64_t begin,
                  int64_t end, float* line, float* out, int64_t cols) {
  const Lines<K, S> lines(cols);
  const int64_t in_cols = S * cols, chunk = most(most_rows_at_once, line_bytes / (S * lines.pitch * 4));
  const float *weight = step.weight + c * K * K, bias = step.bias[c];
  for (int64_t y = begin; y < end; y += chunk) {
    const int64_t n = least(chunk, end - y), top = S * y - lines.pad;
    for (int64_t i = 0; i < S * (n - 1) + K; ++i) {
      float* to = line + i * lines.pitch;
      if (top + i < 0 || top + i >= in_rows)
        std::memset(to, 0, lines.pitch * sizeof(float));
      else
        lines.fill(in + (top + i - first) * in_cols, to);
    }
    const Blocks blocks(n, most_rows_at_once);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t r = blocks.begin(b);
      lines.template some_rows<most_rows_at_once>(blocks.begin(b + 1) - r, line + r * S * lines.pitch, weight, bias,
                                                  step.activation, out + (y + r) * cols);
    }
  }
}

template <int K, int S>
void depthwise(const DepthwiseStep& step, const Map& in, const Map& out, const Parallel& parallel) {
  const bool expands = step.packed != nullptr;
  const Blocks blocks(step.channels, block);
  const int64_t row_bytes = block * in.cols * static_cast<int64_t>(sizeof(float));
  const Blocks bands(out.rows, most(4, (buffer_bytes / row_bytes - K) / S));
  const int64_t most_rows = least(in.rows, S * ((out.rows + bands.count - 1) / bands.count) + K);
  const int64_t plane = staggered(most_rows * in.cols + lanes);
  const Lines<K, S> lines(out.cols);
  const int64_t line_rows = line_bytes / (lines.pitch * 4) + 8 * S + K;
  const int64_t work = step.channels * out.rows * out.cols * (K * K + (expands ? S * S * step.in_channels : 0));
  const int64_t tasks = blocks.count * bands.count;
  parallel(tasks, grain_for(work / tasks), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushDenormals flush;
    const int64_t line_items = lanes + line_rows * lines.pitch + lanes;
    Scratch scratch(Scratch::bytes<const float*>(step.in_channels) + Scratch::bytes<float>(line_items) +
                    Scratch::bytes<float>(expands ? block * plane : 0));
    const float** taps = scratch.take<const float*>(step.in_channels);
    float* line = scratch.take<float>(line_items) + lanes;
    float* buffer = scratch.take<float>(expands ? block * plane : 0);
    std::memset(line - lanes, 0, lanes * sizeof(float));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t band = t / blocks.count, b = t % blocks.count;
      const int64_t y0 = bands.begin(band), y1 = bands.begin(band + 1);
      const int64_t c0 = blocks.begin(b), channels = blocks.begin(b + 1) - c0;
      const int64_t first = most(0, S * y0 - K / 2), last = least(in.rows, S * (y1 - 1) + K / 2 + 1);
      if (expands) {
        for (int64_t c = 0; c < step.in_channels; ++c) taps[c] = in.data + c * in.plane + first * in.cols;
        RowConv<float> conv{taps,
                            step.in_channels,
                            step.packed + c0 * step.in_channels,
                            channels,
                            buffer,
                            plane,
                            nullptr,
                            0,
                            step.expand_bias + c0,
                            nullptr,
                            Ends::zeroed};
        conv.activation = step.activation;
        conv_span(conv, 0, (last - first) * in.cols);
      }
      for (int64_t c = c0; c < c0 + channels; ++c) {
        const float* from = expands ? buffer + (c - c0) * plane : in.data + c * in.plane;
        channel_rows<K, S>(step, c, from, expands ? first : 0, in.rows, y0, y1, line, out.data + c * out.plane,
                           out.cols);
      }
    }
  });
}

void depthwise_any(const DepthwiseStep& step, const Map& in, const Map& out, const Parallel& parallel) {
  if (step.kernel == 3)
    step.stride == 1 ? depthwise<3, 1>(step, in, out, parallel) : depthwise<3, 2>(step, in, out, parallel);
  else
    step.stride == 1 ? depthwise<5, 1>(step, in, out, parallel) : depthwise<5, 2>(step, in, out, parallel);
}

}  // namespace

void add_depthwise(MapKernels& table) { table.depthwise = depthwise_any; }

}  // namespace SODFAST_ISA
}  // namespace sodfast
