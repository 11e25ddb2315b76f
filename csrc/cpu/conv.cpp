// Dense convolutions of a fused network on dense maps.
//
// 1×1: a plane is one long row, so that every vector is full whatever the map's width; squeeze and excitation's gate
// scales the weights, not the map, and a residual is where the accumulators start.
// 3×3: a window of input rows, copied once per thread, slides down the map. SCFM's x + x ↑y comes about while they
// are copied. With stride 2 a row is kept as its even and its odd columns, so that every tap reads neighbours.
#include "cpu/maps.h"
#include "cpu/table.h"
#include "cpu/window.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

constexpr int64_t lanes = Vec<float>::lanes;
constexpr int64_t window_bytes = 128 << 10;  // of a thread: well within L2
using Fusion = ConvStep::Fusion;

void pack_conv(int64_t outs, int64_t taps, const float* weight, float* packed) {
  pack_weights(outs, taps, packed, [&](int64_t o, int64_t t) { return weight[o * taps + t]; });
}

// -------------------------------------------------------------------------------------------------------- 1×1
// to = the packed weights, those of channel c times gate[c].
void scale_weights(const ConvStep& step, const float* gate, float* __restrict to) {
  const float* from = step.packed;
  const Blocks blocks(step.out_channels, Tile::outs);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t outs = blocks.begin(b + 1) - blocks.begin(b);
    for (int64_t c = 0; c < step.in_channels; ++c, from += outs, to += outs) {
      if (outs == Tile::outs)  // a number that the compiler knows makes this vectors
        for (int o = 0; o < Tile::outs; ++o) to[o] = from[o] * gate[c];
      else
        for (int64_t o = 0; o < outs; ++o) to[o] = from[o] * gate[c];
    }
  }
}

void conv_1x1(const ConvStep& step, const ConvMaps& m, const Parallel& parallel) {
  const int64_t ins = step.in_channels, outs = step.out_channels, pixels = m.out.rows * m.out.cols;
  const int64_t vectors = (pixels + lanes - 1) / lanes, weights = m.gate.data == nullptr ? 0 : ins * outs;
  parallel(vectors, grain_for(ins * outs * lanes), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushDenormals flush;
    Scratch scratch(Scratch::bytes<const float*>(ins) + Scratch::bytes<float>(weights));
    const float** taps = scratch.take<const float*>(ins);
    for (int64_t c = 0; c < ins; ++c) taps[c] = m.in.data + c * m.in.plane;
    RowConv<float> conv{taps,       ins,         step.packed, outs,    m.out.data,   m.out.plane,
                        m.add.data, m.add.plane, step.bias,   nullptr, Ends::zeroed, true};
    conv.activation = step.activation;
    if (weights > 0) {
      float* scaled = scratch.take<float>(weights);
      scale_weights(step, m.gate.data, scaled);
      conv.weights = scaled;
    }
    conv_span(conv, begin * lanes, end * lanes);
  });
}

// -------------------------------------------------------------------------------------------------------- 3×3
// The rows of one map that a convolution reads, as its window wants them.
class Rows {
 public:
  Rows(const ConvStep& step, const ConvMaps& maps)
      : step_(step),
        in_(maps.in),
        up_(maps.up),
        half_((maps.out.cols / lanes + 1) * lanes) {}
  static int64_t line(int64_t cols) { return 2 * cols + 2 + lanes; }

  // Row y of channel c, with zeros behind it.
  void fill(int64_t c, int64_t y, float* row, const Window& window, float* line) const {
    const float* x = in_.data + c * in_.plane + y * in_.pitch;
    if (step_.stride == 2) {
      if (y + 4 < in_.rows) prefetch_row(x + 4 * in_.pitch, in_.cols);
      pad_split_row(x, in_.cols / 2, row, half_);
      return;
    }
    if (step_.fusion == Fusion::none) {
      pad_row(x, in_.cols, row, window.pitch);
    } else {
      const float* up = upsampled(c, y, line);
      for_each_vector<float>(in_.cols, [&](int64_t i, int64_t n) {
        const Vec<float> v = load(x + i, n), u = load(up + i, n);
        store(step_.fusion == Fusion::multiply ? fma(v, u, v) : v + u, row + i, n);
      });
      window.zero_behind(row, in_.cols);
    }
  }
  int64_t half() const { return half_; }

 private:
  const float* upsampled(int64_t c, int64_t y, float* line) const {
    const float* plane = up_.data + c * up_.plane;
    const int64_t factor = in_.cols / up_.cols;
    if (factor == 1) return plane + y * up_.pitch;
    const Between at = between(y, factor);
    const int64_t a = clamp_to(at.lower, up_.rows), b = clamp_to(at.lower + 1, up_.rows);
    float* wide = line + up_.cols + 2;
    upsample_row(plane + a * up_.pitch, plane + b * up_.pitch, static_cast<float>(at.upper), factor, wide, up_.cols,
                 line, false);
    return wide;
  }
  const ConvStep& step_;
  Map in_, up_;
  int64_t half_;
};

void conv_3x3_rows(const ConvStep& step, const ConvMaps& m, int64_t begin, int64_t end) {
  const Rows rows(step, m);
  const int64_t ins = step.in_channels, s = step.stride;
  const Step reach = step_on(step.dilation, m.in.rows, m.in.cols);
  const int64_t margin = (reach.x + 15) / 16 * 16;
  const int64_t pitch = s == 2 ? 2 * rows.half() : (m.in.cols + reach.x + lanes - 1) / lanes * lanes;
  const int64_t bytes_per_row = ins * pitch * static_cast<int64_t>(sizeof(float));
  const int64_t band = most(4, least(end - begin, (window_bytes / bytes_per_row - 2 * reach.y) / s));
  const int64_t capacity = s * (band - 1) + 1 + 2 * reach.y;
  Scratch scratch(Scratch::bytes<float>(Window::items(ins, capacity, pitch, margin)) +
                  Scratch::bytes<const float*>(9 * ins) + Scratch::bytes<float>(Rows::line(m.in.cols)));
  Window window(scratch, ins, capacity, pitch, margin);
  const float** taps = scratch.take<const float*>(9 * ins);
  float* line = scratch.take<float>(Rows::line(m.in.cols));
  window.begin(s * begin - reach.y);
  for (int64_t y = begin; y < end; y += band) {
    const int64_t n = least(band, end - y), first = s * y - reach.y, last = s * (y + n - 1) + reach.y;
    window.drop(first);
    for (; window.end <= last; ++window.end)
      for (int64_t c = 0; c < ins; ++c) {
        float* row = window.row(c, window.end);
        if (window.end < 0 || window.end >= m.in.rows)
          std::memset(row, 0, pitch * sizeof(float));
        else
          rows.fill(c, window.end, row, window, line);
      }
    const float** tap = taps;
    for (int64_t c = 0; c < ins; ++c)
      for (int64_t dy = -1; dy <= 1; ++dy) {
        const float* row = window.row(c, s * y + dy * reach.y);
        if (s == 2) {
          *tap++ = row + rows.half() - 1, *tap++ = row, *tap++ = row + rows.half();
        } else {
          *tap++ = row - reach.x, *tap++ = row, *tap++ = row + reach.x;
        }
      }
    RowConv<float> conv{taps,        9 * ins, step.packed, step.out_channels, m.out.data + y * m.out.pitch,
                        m.out.plane, nullptr, 0,           step.bias,         nullptr,
                        Ends::cut};
    conv.activation = step.activation;
    conv_rows(conv, s * pitch, 0, m.out.pitch, n, m.out.cols);
  }
}

void conv(const ConvStep& step, const ConvMaps& m, const Parallel& parallel) {
  if (step.kernel == 1) return conv_1x1(step, m, parallel);
  for_row_ranges(
      1, [&](int) { return m.out.rows; }, 9 * step.in_channels * step.out_channels * m.out.rows * m.out.cols, parallel,
      [&](int, int64_t y0, int64_t y1) { conv_3x3_rows(step, m, y0, y1); });
}

}  // namespace

void add_conv(MapKernels& table) {
  table.pack_conv = pack_conv;
  table.conv = conv;
}

}  // namespace SODFAST_ISA
}  // namespace sodfast
