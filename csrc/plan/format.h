// A .sodfast file: a fused network, ready to run. sodfast/plan.py writes it, plan.cpp reads it.
//
//   Header | TensorEntry × tensors | words × words | float × floats         little-endian, no padding
//
// A tensor is a feature map of `channels` channels at height >> level, width >> level; or, where level is `vector`, one
// number per channel. Tensor 0 is the image, the last one the result. The words hold the steps, each as its kind, its
// number of further words, and these:
//
//   block     in_scales, in[4], out_scales, out[4], kernel, stride, depthwise, head, weight, bias, slope,
//             (weight, bias, slope) × 2 of the depthwise layers, weight, bias of the head
//   bank      scales, in[4], out[4], dilations, dilation[8], branch[4][8], weight[4], bias, slope
//   upsample  in, out
//   conv      in, out, kernel, stride, dilation, activation, fusion, up, gate, add, weight, bias
//   depthwise in, out, kernel, stride, activation, expand weight, expand bias, weight, bias
//   gate      in, out, squeezed, weight, bias, expand weight, expand bias, slope
//
// in, out, up, gate and add are tensors; weight, bias, slope are positions among the floats; any of these but in and
// out may be `none`. An activation is a number of common/shapes.h's Activation. See cpu/maps.h for what all mean and
// the shapes they have.
#pragma once

#include <cstdint>

namespace sodfast::plan {

constexpr char magic[8] = {'s', 'o', 'd', 'f', 'a', 's', 't', '\n'};
constexpr uint32_t version = 1, byte_order = 0x01020304;
constexpr uint32_t none = 0xffffffff;
constexpr uint32_t most_entries = 4096;  // of tensors, steps, and channels of one tensor
constexpr int most_level = 8, vector = 0xff;
constexpr uint32_t most_image_channels = 8;
constexpr uint32_t most_side = 1 << 15;  // of an image, in pixels

struct Header {
  char magic[8];
  uint32_t version, byte_order;
  uint64_t size;  // of the file
  uint32_t crc;   // CRC-32 of what follows the header
  uint32_t tensors, steps, words, floats;
  uint32_t height, width;                                     // what the network was trained for
  uint32_t multiple;                                          // that height and width must be of
  float mean[most_image_channels], std[most_image_channels];  // of an image with values 0 … 1
};
static_assert(sizeof(Header) == 120);

struct TensorEntry {
  uint32_t channels, level;
};

enum class Kind : uint32_t { block = 1, bank = 2, upsample = 3, conv = 4, depthwise = 5, gate = 6 };

struct BlockWords {
  uint32_t in_scales, in[4], out_scales, out[4], kernel, stride, depthwise, head, weight, bias, slope;
  struct {
    uint32_t weight, bias, slope;
  } layer[2];
  uint32_t head_weight, head_bias;
};
struct BankWords {
  uint32_t scales, in[4], out[4], dilations, dilation[8], branch[4][8], weight[4], bias, slope;
};
struct UpsampleWords {
  uint32_t in, out;
};
struct ConvWords {
  uint32_t in, out, kernel, stride, dilation, activation, fusion, up, gate, add, weight, bias;
};
struct DepthwiseWords {
  uint32_t in, out, kernel, stride, activation, expand_weight, expand_bias, weight, bias;
};
struct GateWords {
  uint32_t in, out, squeezed, weight, bias, expand_weight, expand_bias, slope;
};

}  // namespace sodfast::plan
