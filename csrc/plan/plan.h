// A fused network as a list of steps over an arena. Knows no torch; sodfast.h and csrc/bind are its two faces.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "cpu/maps.h"
#include "plan/format.h"

namespace sodfast::plan {

// What is wrong with a file or a call, as a sentence.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Plan {
 public:
  // Reads a whole file; nothing of `data` is kept. Every number in it is checked before it is used; memory and time
  // are proportional to `size`. Raises Error.
  Plan(const void* data, size_t size);

  const Header& header() const { return header_; }
  int64_t in_channels() const { return tensors_.front().channels; }
  int64_t out_channels() const { return tensors_.back().channels; }
  int64_t multiple() const { return int64_t(1) << deepest_; }  // of height and width
  int64_t steps() const { return static_cast<int64_t>(steps_.size()); }
  const MapKernels& kernels() const { return kernels_; }

  // image: (batch, in_channels, height, width); result: (batch, out_channels, height, width); both contiguous.
  // A single image shares its rows among the threads, a batch its images. May be called by several threads at once;
  // each such call has an arena of its own, which is kept for the next. seconds: null, or room for one per step,
  // to which the time of each is added (the batch must be 1). Raises Error, or bad_alloc.
  void run(const float* image, float* result, int64_t batch, int64_t height, int64_t width, const Parallel& parallel,
           double* seconds = nullptr);
  int64_t arena_bytes(int64_t height, int64_t width) const;

 private:
  struct Block {
    BlockStep step;
    uint32_t in[max_scales], out[max_scales];
  };
  struct Bank {
    BankStep step;
    uint32_t in[max_scales], out[max_scales];
  };
  struct Upsample {
    uint32_t in, out;
    int64_t factor;
  };
  struct Conv {
    ConvStep step;
    uint32_t in, out, up, gate, add;  // the last three may be `none`
  };
  struct Depthwise {
    DepthwiseStep step;
    uint32_t in, out;
  };
  struct Gate {
    GateStep step;
    uint32_t in, out;
  };
  using AnyStep = std::variant<Block, Bank, Upsample, Conv, Depthwise, Gate>;
  struct Tensor {
    int64_t channels;
    int level;
    int64_t written = -1, last_read = -1;  // steps
    bool dense = false;                    // what the steps are that write and read it: see Map
  };
  struct Place {  // of a tensor in the arena, in floats
    size_t tensor;
    int64_t size, offset;
  };
  // One image on its way through the steps.
  struct Context {
    int64_t height = 0, width = 0;
    std::unique_ptr<float, void (*)(void*)> arena{nullptr, nullptr};
    int64_t arena_size = 0;
    std::vector<Map> maps;
    std::vector<Place> places;
  };
  class Reader;
  class Lease;

  Map map_of(const Tensor&, int64_t height, int64_t width) const;
  int64_t lay_out(int64_t height, int64_t width, std::vector<Place>& places) const;
  void prepare(Context&, int64_t height, int64_t width) const;
  void run_image(Context&, const float* image, float* result, const Parallel&, double* seconds) const;

  Header header_;
  const MapKernels& kernels_;
  std::vector<Tensor> tensors_;
  std::vector<AnyStep> steps_;
  std::vector<float> floats_, packed_;
  int deepest_ = 0;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Context>> idle_;
};

uint32_t crc32(const void* data, size_t size);

}  // namespace sodfast::plan
