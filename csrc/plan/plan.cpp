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
      context->maps.resize(plan.tensors_.size()), context->places.reserve(plan.tensors_.size());
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
  map.channels = t.channels, map.rows = map.cols = map.pitch = map.plane = 1;
  if (t.level == vector) return map;
  map.rows = height >> t.level, map.cols = width >> t.level;
  map.pitch = t.dense ? map.cols : kernels_.pitch_for(map.cols);
  map.plane = staggered(map.rows * map.pitch);
  return map;
}

// The largest tensors first, each at the lowest place where none that lives at the same time lies; returns the arena's
// size in floats.
int64_t Plan::lay_out(int64_t height, int64_t width, std::vector<Place>& places) const {
  places.clear();
  for (size_t i = 1; i + 1 < tensors_.size(); ++i) {
    const Map map = map_of(tensors_[i], height, width);
    if (map.channels > 0 && tensors_[i].written > 0) places.push_back({i, map.channels * map.plane + room, -1});
  }
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.size != b.size ? a.size > b.size : a.tensor < b.tensor; });
  int64_t arena = 0;
  for (size_t i = 0; i < places.size(); ++i) {
    Place& place = places[i];
    const Tensor& t = tensors_[place.tensor];
    int64_t offset = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t k = 0; k < i; ++k) {
        const Place& other = places[k];
        const Tensor& o = tensors_[other.tensor];
        if (o.last_read < t.written || t.last_read < o.written) continue;
        if (offset < other.offset + other.size && other.offset < offset + place.size)
          offset = other.offset + other.size, moved = true;
      }
    }
    place.offset = offset;
    arena = std::max(arena, offset + place.size);
  }
  return arena;
}

int64_t Plan::arena_bytes(int64_t height, int64_t width) const {
  std::vector<Place> places;
  return lay_out(height, width, places) * static_cast<int64_t>(sizeof(float));
}

void Plan::prepare(Context& context, int64_t height, int64_t width) const {
  if (context.height == height && context.width == width) return;
  context.height = 0;
  const int64_t size = lay_out(height, width, context.places);
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
      map.data = context.arena.get();  // of a tensor without channels, which has no place of its own
    }
  }
  for (const Place& place : context.places) context.maps[place.tensor].data = context.arena.get() + place.offset;
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
    } else if (const auto* conv = std::get_if<Conv>(&steps_[i])) {
      const auto optional = [&](uint32_t index) { return index == none ? Map{} : maps[index]; };
      const ConvMaps places{maps[conv->in], optional(conv->up), optional(conv->gate), optional(conv->add),
                            maps[conv->out]};
      kernels_.conv(conv->step, places, parallel);
    } else if (const auto* depthwise = std::get_if<Depthwise>(&steps_[i])) {
      kernels_.depthwise(depthwise->step, maps[depthwise->in], maps[depthwise->out], parallel);
    } else if (const auto* gate = std::get_if<Gate>(&steps_[i])) {
      kernels_.gate(gate->step, maps[gate->in], maps[gate->out].data, parallel);
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
