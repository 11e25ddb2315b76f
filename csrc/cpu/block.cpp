// A block of a fused network in one pass by bands of rows: gOctConv with all its resampling, then (ILBlock) two
// depthwise 3×3, each with its epilogue.
//
// Every output scale goes down its rows on its own. Between the layers stand windows of a few rows that stay in L2:
//
//   finer inputs, pooled ─┐
//   input of this scale  ─┴→ conv 1×1 or 3×3 → [window, all channels] → per channel: depthwise → [lines in L1]
//   coarser inputs → conv at their size → stretched along the row → blended: where the   → depthwise → output
//                                                       accumulators start
//
// Nothing but the block's output goes to memory, and no row is computed twice but at the ends of a thread's range.
#include <optional>

#include "cpu/depthwise_rows.h"
#include "cpu/maps.h"
#include "cpu/table.h"
#include "cpu/window.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

constexpr int64_t lanes = Vec<float>::lanes;
constexpr int64_t window_bytes = 512 << 10;  // of a thread: well within L2
constexpr int64_t line_bytes = 20 << 10;     // of what stays in L1

inline int64_t pitch_for(int64_t cols) { return (cols / lanes + 1) * lanes; }
inline int64_t begin_of(const int64_t* channels, int s) {
  int64_t sum = 0;
  for (int i = 0; i < s; ++i) sum += channels[i];
  return sum;
}

// The sources of output scale s, and where their packed weights lie.
struct Sources {
  int fine, n_coarse = 0, coarse[max_scales];
  int64_t fine_channels, taps = 0;                        // taps: of the largest convolution
  int64_t fine_weights, coarse_weights[max_scales], end;  // offsets into BlockStep::packed

  Sources(const BlockStep& step, int s) {
    const int64_t k2 = step.kernel * step.kernel, in = begin_of(step.in_channels, step.in_scales);
    fine = static_cast<int>(least(s + 1, step.in_scales));
    fine_channels = begin_of(step.in_channels, fine);
    taps = fine_channels * k2;
    fine_weights = begin_of(step.out_channels, s) * in * k2;
    end = fine_weights + step.out_channels[s] * fine_channels * k2;
    for (int i = fine; i < step.in_scales; ++i) {
      if (step.in_channels[i] == 0) continue;
      taps = most(taps, step.in_channels[i] * k2);
      coarse_weights[n_coarse] = end, coarse[n_coarse++] = i;
      end += step.out_channels[s] * step.in_channels[i] * k2;
    }
  }
};

void pack_block(const BlockStep& step, const float* weight, float* packed) {
  const int64_t k2 = step.kernel * step.kernel, in = begin_of(step.in_channels, step.in_scales);
  for (int s = 0; s < step.out_scales; ++s) {
    const Sources from(step, s);
    const int64_t o0 = begin_of(step.out_channels, s), outs = step.out_channels[s];
    const auto pack = [&](int64_t c0, int64_t channels, float* dst) {
      pack_weights(outs, channels * k2, dst,
                   [&](int64_t o, int64_t t) { return weight[((o0 + o) * in + c0 + t / k2) * k2 + t % k2]; });
    };
    pack(0, from.fine_channels, packed + from.fine_weights);
    for (int m = 0; m < from.n_coarse; ++m)
      pack(begin_of(step.in_channels, from.coarse[m]), step.in_channels[from.coarse[m]],
           packed + from.coarse_weights[m]);
  }
}

// One output scale over a range of rows.
class ScaleBlock {
 public:
  ScaleBlock(const BlockStep& step, int s, const Map* in, const Map& out)
      : step_(step),
        s_(s),
        from_(step, s),
        out_(out),
        outs_(step.out_channels[s]),
        o0_(begin_of(step.out_channels, s)),
        rows_((in[0].rows / step.stride) >> s),
        cols_((in[0].cols / step.stride) >> s),
        pitch_(pitch_for(cols_)),
        halo_(step.kernel / 2) {
    for (int i = 0; i < step.in_scales; ++i) {
      sources_[i] = {in[i].data,       in[i].channels, in[i].rows, in[i].cols, i < s ? int64_t(1) << (s - i) : 1,
                     step.stride == 2, in[i].pitch,    in[i].plane};
      const int64_t cols = i < s ? cols_ : sources_[i].out_cols();
      staged_[i] = !sources_[i].direct() || halo_ > 0 || in[i].pitch != pitch_for(cols);
      if (i < from_.fine && staged_[i]) staged_channels_ += in[i].channels;
      line_ = most(line_, PooledMap<float>::line(in[i].cols));
    }
    blocks_ = step.depthwise[0].weight != nullptr;
    int64_t windows = staged_channels_ + (blocks_ ? outs_ : 0);
    for (int m = 0; m < from_.n_coarse; ++m) windows += outs_ / coarse_factor(m);
    const int64_t row = pitch_ * static_cast<int64_t>(sizeof(float));
    band_ = least(window_bytes / most(1, windows * row), most(line_bytes / row, 4)) - 2;
    band_ = most(4, least(band_, rows_ + 3) / 4 * 4);
  }

  void run(int64_t y0, int64_t y1) const {
    State state(*this);
    if (!blocks_) {
      state.begin(y0);
      for (int64_t y = y0; y < y1; y += band_) {
        const int64_t n = least(band_, y1 - y);
        convolve(state, y, n, out_.data + y * out_.pitch, out_.plane, out_.pitch);
      }
      return;
    }
    // Two rows of the first depthwise layer are always ahead of the second's: [y - 1, y + 1).
    Window& conv = state.conv;
    conv.begin(y0 - 2);
    state.begin(most(y0 - 2, 0));
    extend(state, y0 + 2);
    for (int64_t c = 0; c < outs_; ++c) depthwise(0, c, conv.row(c, y0 - 2), y0 - 1, 2, state.ahead.row(c, 0), pitch_);
    conv.drop(y0);
    for (int64_t y = y0; y < y1; y += band_) {
      const int64_t n = least(band_, y1 - y);
      extend(state, y + n + 2);
      const int64_t two_rows = 2 * pitch_ * static_cast<int64_t>(sizeof(float));
      for (int64_t c = 0; c < outs_; ++c) {
        float* lines = state.lines.data;
        std::memcpy(lines, state.ahead.row(c, 0), two_rows);
        depthwise(0, c, conv.row(c, y), y + 1, n, lines + 2 * pitch_, pitch_);
        depthwise(1, c, lines, y, n, out_.data + c * out_.plane + y * out_.pitch, out_.pitch);
        std::memcpy(state.ahead.row(c, 0), lines + n * pitch_, two_rows);
      }
      conv.drop(y + n);
    }
  }

 private:
  // The windows of one thread.
  struct State {
    explicit State(const ScaleBlock& b)
        : scratch(b.scratch_bytes()),
          conv(scratch, b.blocks_ ? b.outs_ : 0, b.band_ + 4, b.pitch_),
          ahead(scratch, b.blocks_ ? b.outs_ : 0, 2, b.pitch_),
          lines(scratch, b.blocks_ ? 1 : 0, b.band_ + 2, b.pitch_),
          staged(scratch, b.staged_channels_, b.band_ + 4 + 2 * b.halo_, b.pitch_) {
      taps = scratch.take<const float*>(b.from_.taps);
      line = scratch.take<float>(b.line_);
      start = scratch.take<float>(b.start_items());
      for (int m = 0; m < b.from_.n_coarse; ++m) {
        const int i = b.from_.coarse[m];
        stretched[m].emplace(scratch, b.outs_, b.coarse_rows(m) + 2, b.pitch_);
        low[m].emplace(scratch, b.outs_, b.coarse_rows(m), pitch_for(b.coarse_cols(m)));
        staged_low[m].emplace(scratch, b.staged_[i] ? b.step_.in_channels[i] : 0, b.coarse_rows(m) + 2 * b.halo_,
                              pitch_for(b.coarse_cols(m)));
      }
      halo = b.halo_;
    }
    void begin(int64_t y) {
      staged.begin(y - halo);
      fresh = true;
    }
    Scratch scratch;
    Window conv, ahead, lines, staged;
    std::optional<Window> stretched[max_scales], low[max_scales], staged_low[max_scales];
    const float** taps;
    float *line, *start;
    int64_t halo;
    bool fresh = true;  // nothing is in `stretched`
  };

  int64_t coarse_factor(int m) const { return int64_t(1) << (from_.coarse[m] - s_); }
  int64_t coarse_cols(int m) const { return cols_ / coarse_factor(m); }
  int64_t coarse_rows(int m) const { return band_ / coarse_factor(m) + 4; }  // more than one call asks for
  int64_t start_chunk() const {                                              // rows whose starting values stay in L1
    return most(1, least(band_, line_bytes / (outs_ * pitch_ * static_cast<int64_t>(sizeof(float)))));
  }
  int64_t start_items() const { return from_.n_coarse == 0 ? 0 : outs_ * start_chunk() * pitch_; }

  int64_t scratch_bytes() const {
    const auto window = [](int64_t channels, int64_t rows, int64_t pitch) {
      return Scratch::bytes<float>(Window::items(channels, rows, pitch));
    };
    int64_t bytes = window(blocks_ ? outs_ : 0, band_ + 4, pitch_) + window(blocks_ ? outs_ : 0, 2, pitch_) +
                    window(blocks_ ? 1 : 0, band_ + 2, pitch_) +
                    window(staged_channels_, band_ + 4 + 2 * halo_, pitch_) + Scratch::bytes<const float*>(from_.taps) +
                    Scratch::bytes<float>(line_) + Scratch::bytes<float>(start_items());
    for (int m = 0; m < from_.n_coarse; ++m) {
      const int i = from_.coarse[m];
      bytes += window(outs_, coarse_rows(m) + 2, pitch_) + window(outs_, coarse_rows(m), pitch_for(coarse_cols(m))) +
               window(staged_[i] ? step_.in_channels[i] : 0, coarse_rows(m) + 2 * halo_, pitch_for(coarse_cols(m)));
    }
    return bytes;
  }

  // Rows up to `end` of the convolution into its window, zeros outside the map.
  void extend(State& state, int64_t end) const {
    Window& conv = state.conv;
    if (conv.end < 0) {
      const int64_t n = least(end, 0) - conv.end;
      conv.zero_rows(conv.end, n), conv.end += n;
    }
    const int64_t n = least(end, rows_) - conv.end;
    if (n > 0) {
      convolve(state, conv.end, n, conv.row(0, conv.end), conv.plane, pitch_);
      if (cols_ % lanes == 0)
        for (int64_t c = 0; c < outs_; ++c)
          for (int64_t r = 0; r < n; ++r) Vec<float>(0.0f).store(conv.row(c, conv.end + r) + cols_);
      conv.end += n;
    }
    if (conv.end < end) conv.zero_rows(conv.end, end - conv.end), conv.end = end;
  }

  // Rows [y, y + n) of depthwise layer l, zeros outside the map; `in` is row y - 1.
  void depthwise(int l, int64_t c, const float* in, int64_t y, int64_t n, float* out, int64_t out_pitch) const {
    const auto& layer = step_.depthwise[l];
    const int64_t o = o0_ + c;
    if (y < 0) std::memset(out, 0, pitch_ * sizeof(float)), in += pitch_, out += out_pitch, ++y, --n;
    const int64_t inside = least(n, rows_ - y);
    depthwise_rows<float, Tail::zeros>(
        {in, pitch_, cols_, layer.weight + 9 * o, layer.bias[o], layer.slope[o], out, out_pitch}, inside);
    if (inside < n) std::memset(out + inside * out_pitch, 0, (n - inside) * pitch_ * sizeof(float));
  }

  // Rows [first, first + n) of the sources [i0, i1) that need it, resampled, with a halo of zeros around the map.
  void stage(Window& window, int i0, int i1, int64_t first, int64_t n, float* line) const {
    window.drop(first - halo_);
    const int64_t end = first + n + halo_;
    int64_t channel = 0;
    for (int i = i0; i < i1; ++i) {
      if (!staged_[i]) continue;
      const PooledMap<float>& map = sources_[i];
      const int64_t rows = map.out_rows(), cols = map.out_cols();
      for (int64_t c = 0; c < map.channels; ++c, ++channel)
        for (int64_t y = window.end; y < end; ++y) {
          float* row = window.row(channel, y);
          if (y < 0 || y >= rows) {
            std::memset(row, 0, window.pitch * sizeof(float));
          } else {
            map.row(c, y, row, line);
            window.zero_behind(row, cols);
          }
        }
    }
    window.end = most(window.end, end);
  }

  // The taps of row y of sources [i0, i1).
  void point(const Window& window, int i0, int i1, int64_t y, const float** taps) const {
    int64_t channel = 0;
    for (int i = i0; i < i1; ++i) {
      const PooledMap<float>& map = sources_[i];
      for (int64_t c = 0; c < map.channels; ++c) {
        if (!staged_[i]) {
          *taps++ = map.data + c * map.plane + y * map.pitch;
          continue;
        }
        for (int64_t dy = -halo_; dy <= halo_; ++dy)
          for (int64_t dx = -halo_; dx <= halo_; ++dx) *taps++ = window.row(channel, y + dy) + dx;
        ++channel;
      }
    }
  }

  // Rows [y, y + n) of the convolution; calls follow each other down the map.
  void convolve(State& state, int64_t y, int64_t n, float* out, int64_t out_stride, int64_t out_pitch) const {
    for (int m = 0; m < from_.n_coarse; ++m) stretch(state, m, y, n);
    state.fresh = false;
    stage(state.staged, 0, from_.fine, y, n, state.line);
    point(state.staged, 0, from_.fine, y, state.taps);
    const int64_t chunk = from_.n_coarse > 0 ? start_chunk() : n;
    RowConv<float> conv{state.taps,
                        from_.fine_channels * step_.kernel * step_.kernel,
                        step_.packed + from_.fine_weights,
                        outs_,
                        out,
                        out_stride,
                        nullptr,
                        0,
                        step_.bias == nullptr ? nullptr : step_.bias + o0_,
                        step_.slope == nullptr ? nullptr : step_.slope + o0_,
                        Ends::zeroed,
                        staged_channels_ == 0,
                        step_.head};
    for (int64_t r = 0; r < n; r += chunk) {
      const int64_t rows = least(chunk, n - r);
      if (from_.n_coarse > 0) {
        // The start has the output's pitch, so that one offset serves both.
        conv.start = state.start, conv.start_stride = start_chunk() * pitch_;
        blend(state, y + r, rows);
      }
      conv.out = out + r * out_pitch;
      if (step_.head != nullptr)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t x = 0; x < pitch_; x += lanes)
            Vec<float>(step_.head_bias == nullptr ? 0.0f : *step_.head_bias).store(conv.out + i * out_pitch + x);
      conv_rows(conv, pitch_, r, out_pitch, rows, cols_);
    }
  }

  // Coarse source m convolved at its own size and stretched along the rows, as far as rows [y, y + n) need it.
  void stretch(State& state, int m, int64_t y, int64_t n) const {
    Window &window = *state.stretched[m], &low = *state.low[m], &staged = *state.staged_low[m];
    const int i = from_.coarse[m];
    const int64_t factor = coarse_factor(m), height = rows_ / factor, width = coarse_cols(m);
    const int64_t first = clamp_to(between(y, factor).lower, height);
    const int64_t last = clamp_to(between(y + n - 1, factor).lower + 1, height);
    if (state.fresh) window.begin(first);
    window.drop(first);
    const int64_t from = window.end, rows = last + 1 - from;
    if (rows <= 0) return;
    staged.begin(from - halo_);
    stage(staged, i, i + 1, from, rows, state.line);
    point(staged, i, i + 1, from, state.taps);
    const RowConv<float> conv{state.taps,
                              step_.in_channels[i] * step_.kernel * step_.kernel,
                              step_.packed + from_.coarse_weights[m],
                              outs_,
                              low.data,
                              low.plane,
                              nullptr,
                              0,
                              nullptr,
                              nullptr,
                              Ends::zeroed};
    conv_rows(conv, low.pitch, 0, low.pitch, rows, width);
    for (int64_t o = 0; o < outs_; ++o)
      for (int64_t r = 0; r < rows; ++r) {
        float* row = low.data + o * low.plane + r * low.pitch;
        row[-1] = row[0], row[width] = row[width - 1];
        upsample_columns(row, factor, window.row(o, from + r), width, false);
      }
    window.end = last + 1;
  }

  // What the coarse sources give to rows [y, y + n).
  void blend(State& state, int64_t y, int64_t n) const {
    const int64_t stride = start_chunk() * pitch_;
    for (int m = 0; m < from_.n_coarse; ++m) {
      const int64_t factor = coarse_factor(m), height = rows_ / factor;
      for (int64_t r = 0; r < n; ++r) {
        const Between at = between(y + r, factor);
        const int64_t a = clamp_to(at.lower, height), b = clamp_to(at.lower + 1, height);
        const Vec<float> wa(static_cast<float>(1 - at.upper)), wb(static_cast<float>(at.upper));
        for (int64_t o = 0; o < outs_; ++o) {
          const float *pa = state.stretched[m]->row(o, a), *pb = state.stretched[m]->row(o, b);
          float* p = state.start + o * stride + r * pitch_;
          for (int64_t x = 0; x < cols_; x += lanes) {
            Vec<float> v = fma(wb, Vec<float>::load(pb + x), wa * Vec<float>::load(pa + x));
            if (m > 0) v = v + Vec<float>::load(p + x);
            v.store(p + x);
          }
        }
      }
    }
  }

  const BlockStep& step_;
  int s_;
  Sources from_;
  Map out_;
  int64_t outs_, o0_, rows_, cols_, pitch_, halo_;
  PooledMap<float> sources_[max_scales];
  bool staged_[max_scales] = {}, blocks_ = false;
  int64_t staged_channels_ = 0, line_ = 0, band_ = 4;
};

void block(const BlockStep& step, const Map* in, const Map* out, const Parallel& parallel) {
  const int64_t rows = in[0].rows / step.stride, cols = in[0].cols / step.stride;
  const int64_t per_pixel = step.kernel * step.kernel * begin_of(step.in_channels, step.in_scales) + 18;
  const int64_t work = per_pixel * begin_of(step.out_channels, step.out_scales) * rows * cols / 2;
  for_row_ranges(
      step.out_scales, [&](int s) { return step.out_channels[s] == 0 ? 0 : rows >> s; }, work, parallel,
      [&](int s, int64_t y0, int64_t y1) { ScaleBlock(step, s, in, out[s]).run(y0, y1); });
}

}  // namespace

void add_block(MapKernels& table) {
  table.lanes = lanes;
  table.pack_block = pack_block;
  table.block = block;
}

}  // namespace SODFAST_ISA
}  // namespace sodfast
