// Reading a .sodfast file. It may come from anywhere: nothing is believed.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "plan/plan.h"

namespace sodfast::plan {

uint32_t crc32(const void* data, size_t size) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  const auto* p = static_cast<const unsigned char*>(data);
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < size; ++i) crc = table[(crc ^ p[i]) & 0xff] ^ (crc >> 8);
  return ~crc;
}

namespace {
template <class... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::string message;
  const auto add = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      message += std::to_string(part);
    else
      message += part;
  };
  (add(parts), ...);
  throw Error(message);
}
}  // namespace

// Turns words into steps. Every tensor is written once, before it is read; every float is used at most once, so that
// the work of a plan is proportional to its file.
class Plan::Reader {
 public:
  Reader(Plan& plan, const uint32_t* words) : plan_(plan), next_(words), end_(words + plan.header_.words) {}

  void read_steps() {
    plan_.tensors_[0].written = 0;
    for (uint32_t i = 0; i < plan_.header_.steps; ++i) {
      step_ = i + 1;
      check(end_ - next_ >= 2, "the steps are cut short");
      const auto kind = static_cast<Kind>(next_[0]);
      const size_t count = next_[1];
      next_ += 2;
      if (kind == Kind::block) {
        read_block(words<BlockWords>(count));
      } else if (kind == Kind::bank) {
        read_bank(words<BankWords>(count));
      } else if (kind == Kind::conv) {
        read_conv(words<ConvWords>(count));
      } else if (kind == Kind::depthwise) {
        read_depthwise(words<DepthwiseWords>(count));
      } else if (kind == Kind::gate) {
        read_gate(words<GateWords>(count));
      } else {
        check(kind == Kind::upsample, "step ", step_, " is of unknown kind ", static_cast<uint32_t>(kind));
        read_upsample(words<UpsampleWords>(count));
      }
    }
    check(next_ == end_, "words are left over behind the steps");
  }

 private:
  template <class W>
  W words(size_t count) {
    constexpr size_t wanted = sizeof(W) / sizeof(uint32_t);
    check(count == wanted, "step ", step_, " has ", count, " words, not ", wanted);
    check(static_cast<size_t>(end_ - next_) >= wanted, "the steps are cut short");
    W w;
    std::memcpy(&w, next_, sizeof(W));
    next_ += wanted;
    return w;
  }

  const Tensor& read(uint32_t index) {
    check(index < plan_.tensors_.size(), "step ", step_, " reads tensor ", index, " of ", plan_.tensors_.size());
    Tensor& t = plan_.tensors_[index];
    check(t.written >= 0, "step ", step_, " reads tensor ", index, " before it is written");
    t.last_read = step_;
    return t;
  }
  const Tensor& write(uint32_t index) {
    check(index < plan_.tensors_.size(), "step ", step_, " writes tensor ", index, " of ", plan_.tensors_.size());
    Tensor& t = plan_.tensors_[index];
    check(t.written < 0, "step ", step_, " writes tensor ", index, " a second time");
    t.written = t.last_read = step_;
    return t;
  }
  // `count` floats from a position on.
  const float* floats(uint32_t position, int64_t count) {
    const auto have = static_cast<int64_t>(plan_.floats_.size());
    check(position <= have && count <= have - position, "step ", step_, " has weights beyond the end");
    used_ += count;
    check(used_ <= have, "step ", step_, ": more weights are used than there are");
    return plan_.floats_.data() + position;
  }
  const float* optional_floats(uint32_t position, int64_t count) {
    return position == none ? nullptr : floats(position, count);
  }
  float* packed(int64_t count) {
    float* p = plan_.packed_.data() + packed_;
    packed_ += count;  // at most used_: there is room
    return p;
  }

  // The channels of `scales` maps, each at half the resolution of the one before; returns the level of the first.
  int pyramid(const uint32_t* index, uint32_t scales, int64_t* channels, bool writing) {
    check(scales >= 1 && scales <= max_scales, "step ", step_, " has ", scales, " scales");
    int level = 0;
    for (uint32_t i = 0; i < scales; ++i) {
      const Tensor& t = writing ? write(index[i]) : read(index[i]);
      if (i == 0) level = t.level;
      check(t.level != vector, "step ", step_, ": tensor ", index[i], " is no map");
      check(t.level == level + static_cast<int>(i), "step ", step_, ": tensor ", index[i], " has level ", t.level);
      channels[i] = t.channels;
    }
    return level;
  }
  static int64_t sum(const int64_t* channels, uint32_t n) {
    int64_t total = 0;
    for (uint32_t i = 0; i < n; ++i) total += channels[i];
    return total;
  }

  void read_block(const BlockWords& w) {
    Block block{};
    BlockStep& step = block.step;
    const int level = pyramid(w.in, w.in_scales, step.in_channels, false);
    check(w.kernel == 1 || w.kernel == 3, "step ", step_, " has a kernel of size ", w.kernel);
    check(w.stride == 1 || w.stride == 2, "step ", step_, " has stride ", w.stride);
    check(w.depthwise <= 1 && w.head <= 1 && w.depthwise + w.head <= 1, "step ", step_, " has unknown parts");
    int64_t written[max_scales] = {};
    const int out_level = pyramid(w.out, w.out_scales, written, true);
    check(out_level == level + (w.stride == 2), "step ", step_, " writes at level ", out_level);
    const int deepest = out_level + static_cast<int>(std::max(w.in_scales, w.out_scales)) - 1;
    plan_.deepest_ = std::max(plan_.deepest_, deepest);
    check(deepest <= static_cast<int>(most_level), "step ", step_, " works at level ", deepest);
    step.in_scales = static_cast<int>(w.in_scales), step.out_scales = static_cast<int>(w.out_scales);
    step.kernel = w.kernel, step.stride = w.stride;
    std::copy(written, written + max_scales, step.out_channels);
    const int64_t in = sum(step.in_channels, w.in_scales);
    if (w.head == 1) {  // one scale; the channels before the head follow from its weights' place
      check(w.out_scales == 1 && written[0] == 1, "step ", step_, " has a head of ", written[0], " channels");
      check(w.head_weight != none && w.head_bias != none && w.head_bias > w.head_weight &&
                w.head_bias - w.head_weight <= most_entries,
            "step ", step_, " has a head without weights");
      step.out_channels[0] = w.head_bias - w.head_weight;
      step.head = floats(w.head_weight, step.out_channels[0]);
      step.head_bias = floats(w.head_bias, 1);
    }
    const int64_t out = sum(step.out_channels, w.out_scales), count = out * in * w.kernel * w.kernel;
    check(in > 0 && out > 0, "step ", step_, " has no channels");
    const float* weight = floats(w.weight, count);
    step.bias = optional_floats(w.bias, out), step.slope = optional_floats(w.slope, out);
    if (w.depthwise == 1)
      for (int l = 0; l < 2; ++l)
        step.depthwise[l] = {floats(w.layer[l].weight, 9 * out), floats(w.layer[l].bias, out),
                             floats(w.layer[l].slope, out)};
    float* to = packed(count);
    plan_.kernels_.pack_block(step, weight, to);
    step.packed = to;
    std::copy(w.in, w.in + max_scales, block.in);
    std::copy(w.out, w.out + max_scales, block.out);
    plan_.steps_.emplace_back(block);
  }

  void read_bank(const BankWords& w) {
    Bank bank{};
    BankStep& step = bank.step;
    int64_t written[max_scales] = {};
    const int level = pyramid(w.in, w.scales, step.in_channels, false);
    check(pyramid(w.out, w.scales, written, true) == level, "step ", step_, " writes at another level");
    check(w.dilations >= 1 && w.dilations <= max_dilations, "step ", step_, " has ", w.dilations, " dilations");
    step.scales = static_cast<int>(w.scales), step.dilations = static_cast<int>(w.dilations);
    for (uint32_t d = 0; d < w.dilations; ++d) {
      step.dilation[d] = w.dilation[d];
      check(w.dilation[d] >= 1 && w.dilation[d] <= 64, "step ", step_, " has dilation ", w.dilation[d]);
    }
    for (uint32_t s = 0; s < w.scales; ++s) {
      int64_t out = 0;
      for (uint32_t d = 0; d < w.dilations; ++d) out += step.branch[s][d] = w.branch[s][d];
      check(out == written[s], "step ", step_, " has ", out, " channels for a tensor of ", written[s]);
      const int64_t count = out * step.in_channels[s] * 9;
      const float* weight = floats(w.weight[s], count);
      float* to = packed(count);
      plan_.kernels_.pack_bank(step, static_cast<int>(s), weight, to);
      step.packed[s] = to;
    }
    const int64_t out = sum(written, w.scales);
    step.bias = optional_floats(w.bias, out), step.slope = optional_floats(w.slope, out);
    std::copy(w.in, w.in + max_scales, bank.in);
    std::copy(w.out, w.out + max_scales, bank.out);
    plan_.steps_.emplace_back(bank);
  }

  void read_upsample(const UpsampleWords& w) {
    const Tensor &in = read(w.in), &out = write(w.out);
    const int factor = in.level - out.level;
    check(in.channels == out.channels && factor >= 0 && factor <= 3 && in.level != vector, "step ", step_,
          " upsamples level ", in.level, " to ", out.level, " and ", in.channels, " channels to ", out.channels);
    check(w.in != 0 && w.out + 1 == plan_.tensors_.size(), "step ", step_, " upsamples something else than the result");
    plan_.steps_.emplace_back(Upsample{w.in, w.out, int64_t(1) << factor});
  }

  // Tensors of the steps on dense maps, which have channels. The image has no room behind its planes.
  const Tensor& read_dense(uint32_t index, bool image_too = false) {
    const Tensor& t = read(index);
    check(t.dense || (index == 0 && image_too), "step ", step_, " reads tensor ", index, ", which is no dense map");
    return t;
  }
  Tensor& write_dense(uint32_t index) {
    write(index);
    Tensor& t = plan_.tensors_[index];
    check(t.channels > 0, "step ", step_, " writes a tensor without channels");
    t.dense = true;
    return t;
  }
  Activation activation(uint32_t word) {
    check(word <= static_cast<uint32_t>(Activation::relu6), "step ", step_, " has unknown activation ", word);
    return static_cast<Activation>(word);
  }
  // The stride between two maps; the work may need even sizes one level further down than the tensors do.
  void check_levels(const Tensor& in, const Tensor& out, uint32_t stride) {
    check(stride == 1 || stride == 2, "step ", step_, " has stride ", stride);
    check(in.level != vector && out.level == in.level + (stride == 2), "step ", step_, " goes from level ", in.level,
          " to ", out.level);
  }
  const float* pack_conv(int64_t outs, int64_t taps, uint32_t weight) {
    const float* from = floats(weight, outs * taps);
    float* to = packed(outs * taps);
    plan_.kernels_.pack_conv(outs, taps, from, to);
    return to;
  }

  void read_conv(const ConvWords& w) {
    Conv conv{{}, w.in, w.out, w.up, w.gate, w.add};
    ConvStep& step = conv.step;
    check(w.kernel == 1 || w.kernel == 3, "step ", step_, " has a kernel of size ", w.kernel);
    const Tensor& in = read_dense(w.in, w.kernel == 3);
    const auto optional = [&](uint32_t index) { return index == none ? nullptr : &read_dense(index); };
    const Tensor *up = optional(w.up), *gate = optional(w.gate), *add = optional(w.add);
    const Tensor& out = write_dense(w.out);  // after the reads: it is none of them
    check_levels(in, out, w.stride);
    check(w.dilation >= 1 && w.dilation <= 64 && (w.dilation == 1 || w.stride == 1), "step ", step_, " has dilation ",
          w.dilation);
    check(w.fusion <= static_cast<uint32_t>(ConvStep::Fusion::add) && (w.fusion != 0) == (w.up != none), "step ", step_,
          " has unknown fusion ", w.fusion);
    check(w.kernel == 3 ? w.gate == none && w.add == none && (w.up == none || w.stride == 1)
                        : w.up == none && w.stride == 1,
          "step ", step_, " has parts that a convolution of its kind has not");
    step.kernel = w.kernel, step.stride = w.stride, step.dilation = w.dilation;
    step.in_channels = in.channels, step.out_channels = out.channels;
    step.fusion = static_cast<ConvStep::Fusion>(w.fusion), step.activation = activation(w.activation);
    check(up == nullptr || (up->channels == in.channels && up->level >= in.level && up->level <= in.level + 3), "step ",
          step_, " fuses another shape");
    check(gate == nullptr || (gate->level == vector && gate->channels == in.channels), "step ", step_,
          " has a gate of another shape");
    check(add == nullptr || (add->level == out.level && add->channels == out.channels), "step ", step_,
          " adds another shape");
    step.packed = pack_conv(out.channels, in.channels * w.kernel * w.kernel, w.weight);
    step.bias = optional_floats(w.bias, out.channels);
    plan_.steps_.emplace_back(conv);
  }

  void read_depthwise(const DepthwiseWords& w) {
    Depthwise depthwise{{}, w.in, w.out};
    DepthwiseStep& step = depthwise.step;
    const Tensor &in = read_dense(w.in), &out = write_dense(w.out);
    check(w.kernel == 3 || w.kernel == 5, "step ", step_, " has a kernel of size ", w.kernel);
    check_levels(in, out, w.stride);
    step.kernel = w.kernel, step.stride = w.stride, step.in_channels = in.channels, step.channels = out.channels;
    step.activation = activation(w.activation);
    if (w.expand_weight != none) {
      step.packed = pack_conv(out.channels, in.channels, w.expand_weight);
      step.expand_bias = floats(w.expand_bias, out.channels);
    } else {
      check(in.channels == out.channels, "step ", step_, " has ", in.channels, " channels and ", out.channels);
    }
    step.weight = floats(w.weight, out.channels * w.kernel * w.kernel), step.bias = floats(w.bias, out.channels);
    plan_.steps_.emplace_back(depthwise);
  }

  void read_gate(const GateWords& w) {
    Gate gate{{}, w.in, w.out};
    GateStep& step = gate.step;
    const Tensor &in = read_dense(w.in), &out = write_dense(w.out);
    check(in.level != vector && out.level == vector && in.channels == out.channels, "step ", step_,
          " gates another tensor");
    check(w.squeezed >= 1 && w.squeezed <= most_entries, "step ", step_, " squeezes to ", w.squeezed, " channels");
    step.channels = in.channels, step.squeezed = w.squeezed;
    step.reduce = floats(w.weight, in.channels * w.squeezed), step.reduce_bias = floats(w.bias, w.squeezed);
    step.expand = floats(w.expand_weight, in.channels * w.squeezed);
    step.expand_bias = floats(w.expand_bias, in.channels);
    step.slope = *floats(w.slope, 1);
    plan_.steps_.emplace_back(gate);
  }

  Plan& plan_;
  const uint32_t *next_, *end_;
  uint32_t step_ = 0;
  int64_t used_ = 0, packed_ = 0;
};

Plan::Plan(const void* data, size_t size) : kernels_(map_kernels()) {
  check(size >= sizeof(Header) && std::memcmp(data, magic, sizeof(magic)) == 0, "this is no .sodfast file");
  std::memcpy(&header_, data, sizeof(Header));
  check(header_.byte_order == byte_order, "the file was written on a machine of another byte order");
  check(header_.version == version, "the file has format ", header_.version, ", and this version of sodfast reads ",
        version);
  check(header_.size == size, "the file has ", size, " bytes, and its header says ", header_.size);
  check(header_.tensors >= 2 && header_.tensors <= most_entries && header_.steps >= 1 && header_.steps <= most_entries,
        "the file has ", header_.tensors, " tensors and ", header_.steps, " steps");
  const uint64_t wanted = sizeof(Header) + uint64_t(header_.tensors) * sizeof(TensorEntry) +
                          (uint64_t(header_.words) + header_.floats) * sizeof(uint32_t);
  check(wanted == size, "the file's parts have ", wanted, " bytes together, and the file ", size);
  const auto* p = static_cast<const char*>(data) + sizeof(Header);
  check(crc32(p, size - sizeof(Header)) == header_.crc, "the file is damaged: its checksum is wrong");

  for (uint32_t i = 0; i < header_.tensors; ++i, p += sizeof(TensorEntry)) {
    TensorEntry entry;
    std::memcpy(&entry, p, sizeof(entry));
    check(entry.channels <= most_entries && (entry.level <= most_level || entry.level == vector), "tensor ", i, " has ",
          entry.channels, " channels at level ", entry.level);
    tensors_.push_back(Tensor{entry.channels, static_cast<int>(entry.level)});
    if (entry.level != vector) deepest_ = std::max(deepest_, static_cast<int>(entry.level));
  }
  const Tensor &image = tensors_.front(), &result = tensors_.back();
  check(image.level == 0 && image.channels >= 1 && image.channels <= most_image_channels, "the image has ",
        image.channels, " channels at level ", image.level);
  check(result.level == 0 && result.channels >= 1, "the result has ", result.channels, " channels at level ",
        result.level);
  for (int64_t c = 0; c < image.channels; ++c)
    check(std::isfinite(header_.mean[c]) && header_.std[c] > 0, "channel ", c, " has no mean or standard deviation");
  check(header_.height <= most_side && header_.width <= most_side, "the file is made for images of ", header_.height,
        "x", header_.width);
  std::vector<uint32_t> words(header_.words);
  if (!words.empty()) std::memcpy(words.data(), p, words.size() * sizeof(uint32_t));
  floats_.resize(header_.floats), packed_.resize(header_.floats);
  if (!floats_.empty())
    std::memcpy(floats_.data(), p + words.size() * sizeof(uint32_t), floats_.size() * sizeof(float));
  for (size_t i = 0; i < floats_.size(); ++i)
    if (std::fabs(floats_[i]) < 1e-30f) floats_[i] = 0;
  steps_.reserve(header_.steps);
  Reader(*this, words.data()).read_steps();
  check(std::holds_alternative<Upsample>(steps_.back()) && result.written >= 0, "no step writes the result");
  check(header_.multiple == multiple(), "the file says that sizes must be multiples of ", header_.multiple,
        ", and its steps of ", multiple());
}

}  // namespace sodfast::plan
