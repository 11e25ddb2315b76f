// The dilated bank of a fused network: per scale, parallel dense 3×3 convolutions at several dilations, concatenated,
// with epilogue. A window of input rows, wide enough for the largest dilation, slides down the map and serves all
// branches; each input row is copied once per thread.
#include "cpu/maps.h"
#include "cpu/table.h"
#include "cpu/window.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

constexpr int64_t window_bytes = 384 << 10;  // of a thread: well within L2

void pack_bank(const BankStep& step, int s, const float* weight, float* packed) {
  const int64_t taps = step.in_channels[s] * 9;
  for (int d = 0; d < step.dilations; ++d) {
    const int64_t outs = step.branch[s][d];
    pack_weights(outs, taps, packed, [&](int64_t o, int64_t t) { return weight[o * taps + t]; });
    weight += outs * taps, packed += outs * taps;
  }
}

int64_t outs_of(const BankStep& step, int s) {
  int64_t sum = 0;
  for (int d = 0; d < step.dilations; ++d) sum += step.branch[s][d];
  return sum;
}

void run_scale(const BankStep& step, int s, const Map& in, const Map& out, int64_t begin, int64_t end) {
  constexpr int64_t L = Vec<float>::lanes;
  Step pad{1, 1};
  for (int d = 0; d < step.dilations; ++d)
    if (step.branch[s][d] > 0) {
      const Step reach = step_on(step.dilation[d], in.rows, in.cols);
      pad = {most(pad.y, reach.y), most(pad.x, reach.x)};
    }
  const int64_t margin = (pad.x + 15) / 16 * 16;
  const int64_t pitch = (in.cols + pad.x + L - 1) / L * L;
  const int64_t bytes_per_row = in.channels * pitch * static_cast<int64_t>(sizeof(float));
  const int64_t band = most(4, least(out.rows, window_bytes / most(1, bytes_per_row) - 2 * pad.y));
  const int64_t capacity = band + 2 * pad.y, taps_count = in.channels * 9;
  Scratch scratch(Scratch::bytes<float>(Window::items(in.channels, capacity, pitch, margin)) +
                  Scratch::bytes<const float*>(taps_count));
  Window window(scratch, in.channels, capacity, pitch, margin);
  const float** taps = scratch.take<const float*>(taps_count);

  int64_t o0 = 0;
  for (int i = 0; i < s; ++i) o0 += outs_of(step, i);
  window.begin(begin - pad.y);
  for (int64_t y = begin; y < end; y += band) {
    const int64_t n = least(band, end - y);
    window.drop(y - pad.y);
    for (; window.end < y + n + pad.y; ++window.end)
      for (int64_t c = 0; c < in.channels; ++c) {
        float* row = window.row(c, window.end);
        if (window.end < 0 || window.end >= in.rows) {
          std::memset(row, 0, pitch * sizeof(float));
        } else {
          std::memcpy(row, in.data + c * in.plane + window.end * in.pitch, in.cols * sizeof(float));
          window.zero_behind(row, in.cols);
        }
      }
    int64_t o = 0;
    const float* weights = step.packed[s];
    for (int d = 0; d < step.dilations; ++d) {
      const int64_t outs = step.branch[s][d];
      if (outs == 0) continue;
      const Step reach = step_on(step.dilation[d], in.rows, in.cols);
      const float** tap = taps;
      for (int64_t c = 0; c < in.channels; ++c)
        for (int64_t dy = -1; dy <= 1; ++dy)
          for (int64_t dx = -1; dx <= 1; ++dx) *tap++ = window.row(c, y + dy * reach.y) + dx * reach.x;
      conv_rows(RowConv<float>{taps, taps_count, weights, outs, out.data + o * out.plane + y * out.pitch, out.plane,
                               nullptr, 0, step.bias == nullptr ? nullptr : step.bias + o0 + o,
                               step.slope == nullptr ? nullptr : step.slope + o0 + o, Ends::zeroed},
                pitch, 0, out.pitch, n, out.cols);
      o += outs, weights += outs * taps_count;
    }
  }
}

void bank(const BankStep& step, const Map* in, const Map* out, const Parallel& parallel) {
  int64_t work = 0;
  for (int s = 0; s < step.scales; ++s) work += outs_of(step, s) * in[s].channels * 9 * in[s].rows * in[s].cols;
  for_row_ranges(
      step.scales, [&](int s) { return out[s].channels == 0 ? 0 : out[s].rows; }, work, parallel,
      [&](int s, int64_t y0, int64_t y1) { run_scale(step, s, in[s], out[s], y0, y1); });
}

}  // namespace

void add_bank(MapKernels& table) {
  table.pack_bank = pack_bank;
  table.bank = bank;
}

}  // namespace SODFAST_ISA
}  // namespace sodfast
