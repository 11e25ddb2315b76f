// The inputs of a convolution as the row kernels want them: pointers into rows, one per channel and kernel position.
//
// Rows that need no work are read where they are. Resampled or padded ones go through line buffers
// [channel][row][pad + cols + pad], filled for a band of rows at a time: zeros around the map cost nothing in the
// inner loop, and channels whose planes are a multiple of 4 KiB apart no longer share cache sets.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/conv_rows.h"
#include "cpu/resample_rows.h"

namespace sodfast {
namespace {

constexpr int64_t band_bytes = 384 << 10;  // line buffers of a task: well within L2
constexpr int64_t tasks_wanted = 8;        // bands are split until there are as many tasks

// Rows per band: as many as fit, a multiple of `unit`, and not so many that threads stay idle.
inline int64_t band_rows(int64_t height, int64_t bytes_per_row, int64_t batch, int64_t unit) {
  int64_t rows = most(band_bytes / most(bytes_per_row, 1) / unit * unit, unit);
  rows = least(rows, (height + unit - 1) / unit * unit);
  while (rows > unit && batch * ((height + rows - 1) / rows) < tasks_wanted) rows = (rows / 2 + unit - 1) / unit * unit;
  return rows;
}

struct Step {  // a distance in rows and columns
  int64_t y, x;
};

// How far apart the taps of a 3×3 are. A dilation past the map's size reads only zeros, however large it is.
inline Step step_on(int64_t dilation, int64_t rows, int64_t cols) {
  return {least(dilation, rows), least(dilation, cols)};
}

template <class T, class Map>
struct Taps {
  const Map* maps;
  int n_maps;
  Step pad;
  int64_t cols;
  int64_t channels = 0;
  bool staged;

  Taps(const Map* m, int n, Step padding, int64_t width, bool always_stage)
      : maps(m),
        n_maps(n),
        pad(padding),
        cols(width),
        staged(always_stage || padding.y > 0 || padding.x > 0) {
    for (int i = 0; i < n; ++i) {
      channels += m[i].channels;
      staged = staged || (m[i].channels > 0 && !m[i].direct());
    }
  }
  int64_t pitch() const { return cols + 2 * pad.x; }
  int64_t plane(int64_t rows) const { return (rows + 2 * pad.y) * pitch(); }
  int64_t buffer(int64_t rows) const { return staged ? channels * plane(rows) : 0; }

  // Fills the buffer with rows [y0 - pad, y0 + rows + pad) of all channels, zeros outside the map.
  void stage(int64_t y0, int64_t rows, T* buffer, T* line) const {
    if (!staged) return;
    for (int i = 0; i < n_maps; ++i) {
      const int64_t height = maps[i].out_rows();
      for (int64_t c = 0; c < maps[i].channels; ++c) {
        for (int64_t y = y0 - pad.y; y < y0 + rows + pad.y; ++y, buffer += pitch()) {
          if (y < 0 || y >= height) {
            std::memset(buffer, 0, pitch() * sizeof(T));
            continue;
          }
          std::memset(buffer, 0, pad.x * sizeof(T));
          std::memset(buffer + pad.x + cols, 0, pad.x * sizeof(T));
          maps[i].row(c, y, buffer + pad.x, line);
        }
      }
    }
  }

  // taps[(channel, ky, kx)] = the row that output row y0 + r meets there; returns the end.
  const T** point(int64_t y0, int64_t rows, int64_t r, const T* buffer, int64_t kernel, Step step,
                  const T** taps) const {
    if (!staged) {
      for (int i = 0; i < n_maps; ++i)
        for (int64_t c = 0; c < maps[i].channels; ++c) *taps++ = maps[i].data + (c * maps[i].rows + y0 + r) * cols;
      return taps;
    }
    for (int64_t c = 0; c < channels; ++c) taps = point_channel(c, rows, r, buffer, kernel, step, taps);
    return taps;
  }
  const T** point_channel(int64_t c, int64_t rows, int64_t r, const T* buffer, int64_t kernel, Step step,
                          const T** taps) const {
    const int64_t first_y = pad.y - kernel / 2 * step.y, first_x = pad.x - kernel / 2 * step.x;
    const T* p = buffer + c * plane(rows) + (r + first_y) * pitch() + first_x;
    for (int64_t ky = 0; ky < kernel; ++ky)
      for (int64_t kx = 0; kx < kernel; ++kx) *taps++ = p + ky * step.y * pitch() + kx * step.x;
    return taps;
  }
};

// Sums of a weight gradient in a fixed number of parts, so that the result does not depend on the threads:
// body(part, begin, end, sums) adds tasks [begin, end) to its own sums; the parts are added in order.
template <class T, class F>
void sum_in_parts(int64_t tasks, int64_t work_per_task, int64_t n, T* total, const Parallel& parallel, const F& body) {
  std::memset(total, 0, n * sizeof(T));
  if (tasks == 0 || n == 0) return;
  const int64_t parts = least(8, tasks);
  Heap<T> sums(parts * n);
  std::memset(sums.data(), 0, parts * n * sizeof(T));
  parallel(parts, grain_for(work_per_task * tasks / parts), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) body(p * tasks / parts, (p + 1) * tasks / parts, sums.data() + p * n);
  });
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t i = 0; i < n; ++i) total[i] += sums.data()[p * n + i];
}

}  // namespace
}  // namespace sodfast
