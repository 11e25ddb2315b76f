// Squeeze and excitation's gate: the mean of every channel, and two small layers on these.
#include "cpu/maps.h"
#include "cpu/table.h"
#include "cpu/window.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

using V = Vec<float>;

float mean(const float* p, int64_t n) {
  V sums[4] = {V(0.0f), V(0.0f), V(0.0f), V(0.0f)};
  int64_t x = 0;
  for (; x + 4 * V::lanes <= n; x += 4 * V::lanes)
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] + V::load(p + x + i * V::lanes);
  for_each_vector<float>(n - x, [&](int64_t i, int64_t k) { sums[0] = sums[0] + load(p + x + i, k); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n);
}

void gate(const GateStep& step, const Map& in, float* gates, const Parallel& parallel) {
  const int64_t channels = step.channels, pixels = in.rows * in.cols;
  parallel(channels, grain_for(pixels), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushDenormals flush;
    for (int64_t c = begin; c < end; ++c) gates[c] = mean(in.data + c * in.plane, pixels);
  });
  [[maybe_unused]] const FlushDenormals flush;
  Scratch scratch(Scratch::bytes<float>(step.squeezed));
  float* squeezed = scratch.take<float>(step.squeezed);
  for (int64_t s = 0; s < step.squeezed; ++s) {
    V total(0.0f);
    for_each_vector<float>(channels, [&](int64_t c, int64_t n) {
      total = fma(load(gates + c, n), load(step.reduce + s * channels + c, n), total);
    });
    const float y = sum(total) + step.reduce_bias[s];
    squeezed[s] = y < 0 ? 0 : y;  // NaN stays NaN
  }
  // Row by row of W₂, which is larger than L1: what is read in order is fetched ahead.
  std::memcpy(gates, step.expand_bias, channels * sizeof(float));
  for (int64_t s = 0; s < step.squeezed; ++s)
    for_each_vector<float>(channels, [&](int64_t c, int64_t n) {
      store(fma(V(squeezed[s]), load(step.expand + s * channels + c, n), load(gates + c, n)), gates + c, n);
    });
  for_each_vector<float>(channels, [&](int64_t c, int64_t n) {
    const V zero(0.0f), one(1.0f), g = fma(V(step.slope), load(gates + c, n), V(0.5f));
    store(where_greater(zero, g, zero, where_greater(g, one, one, g)), gates + c, n);
  });
}

}  // namespace

void add_gate(MapKernels& table) { table.gate = gate; }

}  // namespace SODFAST_ISA
}  // namespace sodfast
