// The geometry of the goctconv family. Scale s is (batch, channels[s], height >> s, width >> s), high resolution
// first; a scale may have no channels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SODFAST_HOST_DEVICE __host__ __device__
#else
#define SODFAST_HOST_DEVICE
#endif

namespace sodfast {

constexpr int max_scales = 4;

enum class Activation : uint32_t { none, relu, hardswish, relu6 };

struct Pyramid {
  int scales = 0;
  int64_t batch = 0, height = 0, width = 0;  // height and width of scale 0
  int64_t channels[max_scales] = {};

  SODFAST_HOST_DEVICE int64_t rows(int s) const { return height >> s; }
  SODFAST_HOST_DEVICE int64_t cols(int s) const { return width >> s; }
  SODFAST_HOST_DEVICE int64_t area(int s) const { return rows(s) * cols(s); }
  SODFAST_HOST_DEVICE int64_t begin(int s) const {  // first channel of scale s among all
    int64_t sum = 0;
    for (int i = 0; i < s; ++i) sum += channels[i];
    return sum;
  }
  SODFAST_HOST_DEVICE int64_t total() const { return begin(scales); }
};

// Cross-scale convolution. `in` holds the inputs' stored sizes; `out` those after the stride, which are also the
// sizes at which the convolutions run.
struct GOctConvShape {
  Pyramid in, out;
  int64_t kernel = 1, stride = 1;
};

struct DepthwiseShape {
  Pyramid maps;
  int64_t dilation = 1;
};

constexpr int max_dilations = 8;
struct DilatedShape {
  Pyramid in, out;
  int dilations = 0;
  int64_t dilation[max_dilations] = {};
  int64_t branch[max_scales][max_dilations] = {};  // output channels of one scale's branch; 0: it is absent
};

// Maps of rows of pixels, all of one size: planes (one channel), or images whose channels lie together. Upsampling:
// from (from_rows, from_cols) to (rows, cols), in either direction.
struct ScfmShape {
  int64_t maps = 0, rows = 0, cols = 0, from_rows = 0, from_cols = 0, channels = 1;
  bool multiply = true;
};

// What makes a thin boundary of z: z - erosion, dilation - z, or dilation - erosion.
constexpr int thin_erosion = 1, thin_dilation = 2;
struct BoundaryShape {
  int64_t planes = 0, rows = 0, cols = 0;
  int64_t k = 1;  // odd, 1 to 31
  int thin = thin_erosion;
};

// Maps of one channel.
struct DkdShape {
  int64_t images = 0, pixels = 0;
};
// How the distillation is weighted; a threshold below 0 is none.
struct DkdRule {
  double p = 0.7, threshold = 0.5, epsilon = 0.01;
};

}  // namespace sodfast
