// Running a plan: where each tensor lies in the arena, and the steps one after the other.
#include "plan/plan.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>

namespace sodfast::plan {
namespace {

constexpr int64_t line = 16;  // floats of a cache line
constexpr int64_t room = 64;  // so that whole vectors may be read past a map's last row

// Planes an odd number of cache lines apart fall into different sets of the cache.
int64_t staggered(int64_t items) {
  const int64_t lines = (items + line - 1) / line;
  return (lines + 1 - lines % 2) * line;
}

Parallel one_thread() {
  return {[](int64_t n, int64_t, Parallel::Body body, void* context) { body(context, 0, n); }};
}

}  // namespace

// An idle context, or a new one; given back at the end.
class Plan::Lease {
 public:
  explicit Lease(Plan& plan) : plan_(plan) {
    const std::lock_guard<std::mutex> lock(plan.mutex_);
    if (plan.idle_.empty()) {
      context = std::make_unique<Context>();
      context->maps.resize(plan.tensors_.size()), context->offsets.resize(plan.tensors_.size());
      plan.idle_.reserve(plan.idle_.capacity() + 1);
    } else {
      context = std::move(plan.idle_.back());
      plan.idle_.pop_back();
    }
  }
  ~Lease() {
    const std::lock_guard<std::mutex> lock(plan_.mutex_);
    plan_.idle_.push_back(std::move(context));
  }
  std::unique_ptr<Context> context;

 private:
  Plan& plan_;
};

Map Plan::map_of(const Tensor& t, int64_t height, int64_t width) const {
  Map map;
  map.channels = t.channels, map.rows = height >> t.level, map.cols = width >> t.level;
  map.pitch = kernels_.pitch_for(map.cols), map.plane = staggered(map.rows * map.pitch);
  return map;
}

// The lowest place for each tensor where none that lives at the same time lies; returns the arena's size in floats.
int64_t Plan::lay_out(int64_t height, int64_t width, std::vector<int64_t>& offsets) const {
  const size_t n = tensors_.size();
  const auto size_of = [&](size_t i) {
    const Map map = map_of(tensors_[i], height, width);
    return map.channels * map.plane + room;
  };
  int64_t arena = 0;
  for (size_t i = 1; i + 1 < n; ++i) offsets[i] = -1;
  // Tensors are placed in the order in which they are written.
  for (int64_t step = 1; step <= steps(); ++step)
    for (size_t i = 1; i + 1 < n; ++i) {
      if (tensors_[i].written != step || tensors_[i].channels == 0) continue;
      const int64_t size = size_of(i);
      int64_t place = 0;
      for (bool moved = true; moved;) {
        moved = false;
        for (size_t k = 1; k + 1 < n; ++k) {
          if (offsets[k] < 0 || tensors_[k].last_read < step) continue;
          if (place < offsets[k] + size_of(k) && offsets[k] < place + size)
            place = offsets[k] + size_of(k), moved = true;
        }
      }
      offsets[i] = place;
      arena = std::max(arena, place + size);
    }
  return arena;
}

int64_t Plan::arena_bytes(int64_t height, int64_t width) const {
  std::vector<int64_t> offsets(tensors_.size());
  return lay_out(height, width, offsets) * static_cast<int64_t>(sizeof(float));
}

void Plan::prepare(Context& context, int64_t height, int64_t width) const {
  if (context.height == height && context.width == width) return;
  context.height = 0;
  const int64_t size = lay_out(height, width, context.offsets);
  if (size > context.arena_size || context.arena == nullptr) {
    context.arena.reset();
    context.arena_size = 0;
    const size_t bytes = static_cast<size_t>((size + line - 1) / line * line) * sizeof(float);
    auto* p = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
    if (p == nullptr) throw std::bad_alloc();
    context.arena = {p, std::free};
    context.arena_size = size;
  }
  for (size_t i = 0; i < tensors_.size(); ++i) {
    Map& map = context.maps[i];
    map = map_of(tensors_[i], height, width);
    if (i == 0 || i + 1 == tensors_.size()) {  // the caller's: not padded
      map.pitch = map.cols, map.plane = map.rows * map.cols;
    } else {
      map.data = context.arena.get() + std::max<int64_t>(context.offsets[i], 0);
    }
  }
  context.height = height, context.width = width;
}

void Plan::run_image(Context& context, const float* image, float* result, const Parallel& parallel,
                     double* seconds) const {
  std::vector<Map>& maps = context.maps;
  maps.front().data = const_cast<float*>(image);  // no step writes tensor 0
  maps.back().data = result;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto start = std::chrono::steady_clock::now();
    Map in[max_scales], out[max_scales];
    const auto gather = [&](const auto& step, int in_scales, int out_scales) {
      for (int s = 0; s < in_scales; ++s) in[s] = maps[step.in[s]];
      for (int s = 0; s < out_scales; ++s) out[s] = maps[step.out[s]];
    };
    if (const auto* block = std::get_if<Block>(&steps_[i])) {
      gather(*block, block->step.in_scales, block->step.out_scales);
      kernels_.block(block->step, in, out, parallel);
    } else if (const auto* bank = std::get_if<Bank>(&steps_[i])) {
      gather(*bank, bank->step.scales, bank->step.scales);
      kernels_.bank(bank->step, in, out, parallel);
    } else {
      const auto& up = std::get<Upsample>(steps_[i]);
      kernels_.upsample(maps[up.in], up.factor, maps[up.out], parallel);
    }
    if (seconds != nullptr)
      seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

void Plan::run(const float* image, float* result, int64_t batch, int64_t height, int64_t width,
               const Parallel& parallel, double* seconds) {
  if (batch == 0) return;
  const int64_t m = multiple();
  if (height < m || width < m || height % m != 0 || width % m != 0 || height > most_side || width > most_side)
    throw Error("the image is " + std::to_string(height) + "x" + std::to_string(width) +
                ", but height and width must be multiples of " + std::to_string(m) + ", at most " +
                std::to_string(most_side));
  const int64_t in = in_channels() * height * width, out = out_channels() * height * width;
  if (batch == 1) {
    const Lease lease(*this);
    prepare(*lease.context, height, width);
    return run_image(*lease.context, image, result, parallel, seconds);
  }
  parallel(batch, 1, [&](int64_t begin, int64_t end) {
    const Lease lease(*this);
    prepare(*lease.context, height, width);
    for (int64_t b = begin; b < end; ++b)
      run_image(*lease.context, image + b * in, result + b * out, one_thread(), nullptr);
  });
}

}  // namespace sodfast::plan
