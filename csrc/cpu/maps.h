// What the CPU offers a plan (csrc/plan): whole steps of a fused network, one image at a time.
#pragma once

#include "common/parallel.h"
#include "common/shapes.h"

namespace sodfast {

// A feature map of one image. Rows are `pitch` items apart.
//
//   padded   pitch_for(cols): rows may be read and written in whole vectors; what stands behind a row's end is of no
//            account. block, bank and the input of upsample.
//   dense    pitch is cols: a plane is one long row for a 1×1 convolution, which small maps need (22 columns fill 69 %
//            of two vectors). Planes may be read and written in whole vectors. conv, depthwise and gate.
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

// Dense convolution, 1×1 or 3×3 (padding = dilation), with bias and activation, of dense maps. 3×3 also of the image.
struct ConvStep {
  int64_t kernel = 1, stride = 1, dilation = 1, in_channels = 0, out_channels = 0;
  enum class Fusion : uint32_t { none, multiply, add } fusion = Fusion::none;  // with `up`; 3×3, stride 1
  Activation activation = Activation::none;
  const float *packed = nullptr, *bias = nullptr;  // by pack_conv; [out]
};
// Where a convolution reads and writes; what is not there has no data.
struct ConvMaps {
  Map in;
  Map up;    // coarser by 1, 2, 4 or 8: the input is in + in · ↑up, or in + ↑up (SCFM)
  Map gate;  // one number per channel of `in`, which scales it; 1×1
  Map add;   // added to the result, before the activation; 1×1
  Map out;
};

// A 1×1 convolution to more channels with bias and activation, where `packed` is there; then a depthwise k×k with
// bias and activation: the first two layers of an inverted residual. Dense maps.
struct DepthwiseStep {
  int64_t kernel = 3, stride = 1, in_channels = 0, channels = 0;
  Activation activation = Activation::none;               // of both
  const float *packed = nullptr, *expand_bias = nullptr;  // by pack_conv; [channels]
  const float *weight = nullptr, *bias = nullptr;         // [channels, k, k], [channels]
};

// Squeeze and excitation's gate of each channel: clip(slope · (W₂ relu(W₁ mean + b₁) + b₂) + ½, 0, 1).
struct GateStep {
  int64_t channels = 0, squeezed = 0;
  const float *reduce = nullptr, *reduce_bias = nullptr;  // [squeezed, channels], [squeezed]
  const float *expand = nullptr, *expand_bias = nullptr;  // [squeezed, channels] (transposed), [channels]
  float slope = 0;
};

struct MapKernels {
  int64_t lanes;  // floats in a vector
  // packed has as many items as weight. weight: [Σ out, Σ in, k, k]; of the bank [branches of scale s, in, 3, 3].
  void (*pack_block)(const BlockStep&, const float* weight, float* packed);
  void (*pack_bank)(const BankStep&, int scale, const float* weight, float* packed);
  void (*block)(const BlockStep&, const Map* in, const Map* out, const Parallel&);
  void (*bank)(const BankStep&, const Map* in, const Map* out, const Parallel&);
  void (*pack_conv)(int64_t outs, int64_t taps, const float* weight, float* packed);  // weight: [outs, taps]
  void (*conv)(const ConvStep&, const ConvMaps&, const Parallel&);
  void (*depthwise)(const DepthwiseStep&, const Map& in, const Map& out, const Parallel&);
  void (*gate)(const GateStep&, const Map& in, float* gates, const Parallel&);  // gates: [channels]
  // out: rows × cols of in times factor (1, 2, 4 or 8), bilinear; not padded.
  void (*upsample)(const Map& in, int64_t factor, const Map& out, const Parallel&);

  // One column at least is free behind a row: the zero between a row's end and the next one's begin.
  int64_t pitch_for(int64_t cols) const { return (cols / lanes + 1) * lanes; }
};

const MapKernels& map_kernels();  // of cpu_isa()

}  // namespace sodfast
