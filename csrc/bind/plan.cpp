// torch.ops.sodfast.run_plan: a whole fused network in one call.
#include "plan/plan.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>

#include "bind/cpu.h"
#include "plan/threads.h"

namespace sodfast {
namespace {

// As many threads as torch's, but our own: torch's wait for each other at the end of every loop, all of them, whether
// or not another process keeps one from running. A pool that has become too small is left asleep, as somebody may be
// using it, and so is one that a forked process inherits without its threads.
plan::Threads& plan_threads(int n) {
  struct Pool {
    explicit Pool(int n) : asked(n), threads(n) {}
    const int asked;  // the system may have given fewer
    plan::Threads threads;
    const pid_t owner = getpid();
  };
  static std::atomic<Pool*> current{nullptr};
  Pool* pool = current;
  while (pool == nullptr || pool->owner != getpid() || pool->asked < n) {
    auto made = std::make_unique<Pool>(n);
    if (current.compare_exchange_strong(pool, made.get())) pool = made.release();
  }
  return pool->threads;
}

Parallel plan_loops() {
  return {[](int64_t n, int64_t grain, Parallel::Body body, void* context) {
    const int threads = static_cast<int>(torch::stable::get_num_threads());
    if (threads <= 1 || n / grain <= 1) return body(context, 0, n);
    plan_threads(threads).run(n, grain, body, context, threads);
  }};
}

// Plans by the header of their blob (its checksum is in it) and instruction set; the latest few are kept.
std::shared_ptr<plan::Plan> opened(const Tensor& blob) {
  struct Entry {
    plan::Header header;
    const MapKernels* kernels;
    std::shared_ptr<plan::Plan> plan;
  };
  constexpr size_t most_plans = 16;
  static std::mutex mutex;
  static std::list<Entry> entries;
  const char* op = "run_plan";
  check(blob.is_cpu() && blob.dim() == 1 && blob.scalar_type() == ScalarType::Byte && blob.is_contiguous(), op,
        "blob must be a contiguous uint8 vector on the CPU");
  const auto size = static_cast<size_t>(blob.numel());
  const std::lock_guard<std::mutex> lock(mutex);
  if (size >= sizeof(plan::Header))
    for (auto entry = entries.begin(); entry != entries.end(); ++entry)
      if (entry->kernels == &map_kernels() && entry->header.size == size &&
          std::memcmp(&entry->header, blob.const_data_ptr(), sizeof(plan::Header)) == 0) {
        entries.splice(entries.begin(), entries, entry);
        return entries.front().plan;
      }
  try {
    auto made = std::make_shared<plan::Plan>(blob.const_data_ptr(), size);
    entries.push_front({made->header(), &made->kernels(), made});
  } catch (const plan::Error& error) {
    check(false, op, "blob: ", error.what());
  }
  if (entries.size() > most_plans) entries.pop_back();
  return entries.front().plan;
}

struct Call {
  std::shared_ptr<plan::Plan> plan;
  Tensor x, y;

  Call(const char* op, const Tensor& image, const Tensor& blob) : plan(opened(blob)), x(image), y(image) {
    check(x.is_cpu() && x.dim() == 4 && x.scalar_type() == ScalarType::Float && x.size(1) == plan->in_channels(), op,
          "x must be float32 (B, ", plan->in_channels(), ", H, W) on the CPU, got ", shape_of(x));
    x = torch::stable::contiguous(image);
    y = empty_for(x, {x.size(0), plan->out_channels(), x.size(2), x.size(3)});
  }
  void run(const char* op, double* seconds) const {
    try {
      plan->run(read<float>(x), write<float>(y), x.size(0), x.size(2), x.size(3), plan_loops(), seconds);
    } catch (const plan::Error& error) {
      check(false, op, error.what());
    }
  }
};

Tensor run_plan(const Tensor& x, const Tensor& blob) {
  const Call call("run_plan", x, blob);
  call.run("run_plan", nullptr);
  return call.y;
}

Tensor time_plan(const Tensor& x, const Tensor& blob, int64_t repeats) {
  const char* op = "time_plan";
  check(repeats >= 1, op, "repeats must be at least 1, got ", repeats);
  const Call call(op, x, blob);
  check(call.x.size(0) == 1, op, "x must hold one image, got ", shape_of(x));
  const int64_t steps = call.plan->steps();
  const Tensor result = torch::stable::new_empty(x, {repeats, steps}, ScalarType::Double);
  double* seconds = write<double>(result);
  std::memset(seconds, 0, static_cast<size_t>(repeats * steps) * sizeof(double));
  for (int64_t r = 0; r < repeats; ++r) call.run(op, seconds + r * steps);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sodfast, CPU, m) {
  m.impl("run_plan", TORCH_BOX(&run_plan));
  m.impl("time_plan", TORCH_BOX(&time_plan));
}

}  // namespace sodfast
