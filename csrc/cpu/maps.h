// What the CPU offers a plan (csrc/plan): whole steps of a fused network on padded maps, one image at a time.
#pragma once

#include "common/parallel.h"
#include "common/shapes.h"

namespace sodfast {

// A feature map of one image. Rows are `pitch` items apart. A padded one has pitch_for(cols) and may be read and
// written in whole vectors; what stands behind a row's end is of no account.
struct Map {
  float* data = nullptr;
  int64_t channels = 0, rows = 0, cols = 0, pitch = 0, plane = 0;
};

// gOctConv with its epilogue; then, where `depthwise` is there, twice a depthwise 3×3 with epilogue (an ILBlock); or,
// where `head` is there, a 1×1 convolution of output scale 0 to the one channel that is written.
struct BlockStep {
  int in_scales = 0, out_scales = 0;
  int64_t in_channels[max_scales] = {}, out_channels[max_scales] = {};
  int64_t kernel = 1, stride = 1;
  const float* packed = nullptr;                  // by pack_block
  const float *bias = nullptr, *slope = nullptr;  // [Σ out]; null: none
  struct Depthwise {
    const float *weight = nullptr, *bias = nullptr, *slope = nullptr;  // [Σ out, 3, 3], [Σ out], [Σ out]
  } depthwise[2];
  const float *head = nullptr, *head_bias = nullptr;  // [out], [1]
};

struct BankStep {
  int scales = 0, dilations = 0;
  int64_t in_channels[max_scales] = {}, dilation[max_dilations] = {}, branch[max_scales][max_dilations] = {};
  const float* packed[max_scales] = {};  // by pack_bank
  const float *bias = nullptr, *slope = nullptr;
};

struct MapKernels {
  int64_t lanes;  // floats in a vector
  // packed has as many items as weight. weight: [Σ out, Σ in, k, k]; of the bank [branches of scale s, in, 3, 3].
  void (*pack_block)(const BlockStep&, const float* weight, float* packed);
  void (*pack_bank)(const BankStep&, int scale, const float* weight, float* packed);
  void (*block)(const BlockStep&, const Map* in, const Map* out, const Parallel&);
  void (*bank)(const BankStep&, const Map* in, const Map* out, const Parallel&);
  // out: rows × cols of in times factor (1, 2, 4 or 8), bilinear; not padded.
  void (*upsample)(const Map& in, int64_t factor, const Map& out, const Parallel&);

  // One column at least is free behind a row: the zero between a row's end and the next one's begin.
  int64_t pitch_for(int64_t cols) const { return (cols / lanes + 1) * lanes; }
};

const MapKernels& map_kernels();  // of cpu_isa()

}  // namespace sodfast
