// Bilinear upsampling of a plan's last map to the image's size.
#include "cpu/maps.h"
#include "cpu/table.h"
#include "cpu/window.h"

namespace sodfast {
namespace SODFAST_ISA {
namespace {

void upsample(const Map& in, int64_t factor, const Map& out, const Parallel& parallel) {
  for_row_ranges(
      1, [&](int) { return out.rows; }, out.channels * out.rows * out.cols, parallel,
      [&](int, int64_t y0, int64_t y1) {
        Scratch scratch(Scratch::bytes<float>(in.cols + 2));
        float* line = scratch.take<float>(in.cols + 2);
        for (int64_t c = 0; c < in.channels; ++c) {
          const float* plane = in.data + c * in.plane;
          for (int64_t y = y0; y < y1; ++y) {
            float* row = out.data + c * out.plane + y * out.pitch;
            if (factor == 1) {
              std::memcpy(row, plane + y * in.pitch, out.cols * sizeof(float));
              continue;
            }
            const Between at = between(y, factor);
            const int64_t a = clamp_to(at.lower, in.rows), b = clamp_to(at.lower + 1, in.rows);
            upsample_row(plane + a * in.pitch, plane + b * in.pitch, static_cast<float>(at.upper), factor, row, in.cols,
                         line, false);
          }
        }
      });
}

}  // namespace

void add_upsample(MapKernels& table) { table.upsample = upsample; }

}  // namespace SODFAST_ISA
}  // namespace sodfast
