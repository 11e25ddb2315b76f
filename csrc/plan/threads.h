// The threads that share the steps of a plan.
//
// A plan has some sixty steps of a tenth of a millisecond, with a meeting of all threads after each. A thread that
// sleeps takes half of that to wake up, and one that another process keeps from running holds up all: so who waits
// looks again and again for a little longer than a step takes before it sleeps, and ranges belong to nobody: whoever is
// there takes the next one, the caller too.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "common/parallel.h"

namespace sodfast::plan {

// One loop at a time; who comes second runs its loop alone.
class Threads {
 public:
  // n with the caller, or as many as the system gives.
  explicit Threads(int n) {
    workers_.reserve(static_cast<size_t>(std::max(n - 1, 0)));
    try {
      for (int i = 1; i < n; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
    }
  }
  ~Threads() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  Threads(const Threads&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // At most `most` of the threads take part, with the caller. The first exception of body is thrown again.
  void run(int64_t n, int64_t grain, Parallel::Body body, void* context, int most) {
    const int64_t ranges = std::min<int64_t>(std::min(size(), most), n / grain);
    if (ranges <= 1) return body(context, 0, n);
    std::unique_lock<std::mutex> one_at_a_time(callers_, std::try_to_lock);
    if (!one_at_a_time.owns_lock()) return body(context, 0, n);
    // Nobody reads these: all ranges of the loop before are done.
    body_ = body, context_ = context, n_ = n, failure_ = nullptr;
    left_ = ranges;
    const uint64_t before = open_;
    open_ = Open{static_cast<uint32_t>(before >> 32) + 1, 0, static_cast<uint16_t>(ranges)}.packed();
    if (asleep_ > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    take_ranges();
    if (!look_for([this] { return left_ == 0; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      caller_sleeps_ = true;
      done_.wait(lock, [this] { return left_ == 0; });
      caller_sleeps_ = false;
    }
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // The loop that is open, in one number that changes at once: which it is, its next range, and of how many.
  struct Open {
    uint32_t loop;
    uint16_t next, ranges;
    static Open of(uint64_t p) {
      return {static_cast<uint32_t>(p >> 32), static_cast<uint16_t>(p >> 16), static_cast<uint16_t>(p)};
    }
    uint64_t packed() const { return uint64_t(loop) << 32 | uint64_t(next) << 16 | ranges; }
    bool has_more() const { return next < ranges; }
  };

  bool has_more() const { return Open::of(open_).has_more(); }

  void work() {
    for (;;) {
      if (!look_for([this] { return has_more(); })) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;  // before looking once more: a caller opens a loop and then asks who sleeps
        wake_.wait(lock, [this] { return stop_ || has_more(); });
        --asleep_;
        if (stop_) return;
      }
      take_ranges();
    }
  }

  void take_ranges() {
    for (uint64_t seen = open_; Open::of(seen).has_more();) {
      Open next = Open::of(seen);
      const int64_t i = next.next++;
      if (!open_.compare_exchange_weak(seen, next.packed())) continue;
      // From here to `left_` the loop cannot end.
      try {
        body_(context_, i * n_ / next.ranges, (i + 1) * n_ / next.ranges);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        failure_ = std::current_exception();
      }
      if (--left_ == 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (caller_sleeps_) done_.notify_one();
      }
      seen = open_;
    }
  }

  // Whether it came true within the time of a step.
  template <class F>
  static bool look_for(const F& came_true) {
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < 32; ++i) {
        if (came_true()) return true;
        _mm_pause();
      }
      std::this_thread::yield();  // to whom we wait for, where both have one core
    } while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(200));
    return false;
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_, callers_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> open_{0};
  std::atomic<int64_t> left_{0};
  std::atomic<int> asleep_{0};
  Parallel::Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0;
  std::exception_ptr failure_;
  bool caller_sleeps_ = false, stop_ = false;
};

}  // namespace sodfast::plan
