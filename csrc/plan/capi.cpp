// The C API (sodfast.h) and the threads behind it.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <thread>

#include "plan/plan.h"
#include "plan/sodfast.h"

namespace sodfast::plan {
namespace {

// A few threads that wait for ranges of a loop. One loop at a time; who comes second runs its loop alone.
class Threads {
 public:
  explicit Threads(int n) {
    for (int i = 1; i < n; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Threads() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(int64_t n, int64_t grain, Parallel::Body body, void* context) {
    const int64_t ranges = std::min(static_cast<int64_t>(workers_.size()) + 1, n / grain);
    std::unique_lock<std::mutex> one_at_a_time(callers_, std::try_to_lock);
    if (ranges <= 1 || !one_at_a_time.owns_lock()) return body(context, 0, n);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = body, context_ = context, n_ = n, ranges_ = ranges;
      next_ = 0, left_ = ranges, failure_ = nullptr;
    }
    wake_.notify_all();
    take_ranges();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    ranges_ = 0;
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  void work() {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return stop_ || next_ < ranges_; });
        if (stop_) return;
      }
      take_ranges();
    }
  }
  void take_ranges() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      if (next_ >= ranges_) return;
      const int64_t i = next_++, begin = i * n_ / ranges_, end = (i + 1) * n_ / ranges_;
      lock.unlock();
      std::exception_ptr failure;
      try {
        body_(context_, begin, end);
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      if (failure != nullptr) failure_ = failure;
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_, callers_;
  std::condition_variable wake_, done_;
  Parallel::Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0, ranges_ = 0, next_ = 0, left_ = 0;
  std::exception_ptr failure_;
  bool stop_ = false;
};

thread_local Threads* current_threads = nullptr;  // of the network that this thread is running
thread_local char message[256] = "";

void set_message(const char* text) { std::snprintf(message, sizeof(message), "%s", text); }

// f's result, or what its exception means.
template <class F>
sodfast_status guarded(const F& f) {
  try {
    return f();
  } catch (const Error& error) {
    set_message(error.what());
    return SODFAST_ERROR_FORMAT;
  } catch (const std::bad_alloc&) {
    set_message("there is not enough memory");
    return SODFAST_ERROR_MEMORY;
  } catch (const std::exception& error) {
    set_message(error.what());
    return SODFAST_ERROR_INTERNAL;
  }
}

sodfast_status refuse(const char* text) {
  set_message(text);
  return SODFAST_ERROR_ARGUMENT;
}

}  // namespace
}  // namespace sodfast::plan

struct sodfast_network {
  sodfast_network(const void* data, size_t size, int n) : plan(data, size), threads(n) {}
  sodfast::plan::Plan plan;
  sodfast::plan::Threads threads;
};

using namespace sodfast::plan;

sodfast_status sodfast_open_memory(const void* data, size_t size, int threads, sodfast_network** network) {
  if (network == nullptr) return refuse("network is null");
  *network = nullptr;
  if (data == nullptr) return refuse("data is null");
  if (threads < 1 || threads > 256) return refuse("threads must be 1 to 256");
  return guarded([&] {
    *network = new sodfast_network(data, size, threads);
    return SODFAST_OK;
  });
}

sodfast_status sodfast_open(const char* path, int threads, sodfast_network** network) {
  if (network == nullptr) return refuse("network is null");
  *network = nullptr;
  if (path == nullptr) return refuse("path is null");
  return guarded([&] {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    if (file == nullptr) {
      std::snprintf(message, sizeof(message), "%s: %s", path, std::strerror(errno));
      return SODFAST_ERROR_FILE;
    }
    std::vector<char> data;
    constexpr size_t step = size_t(1) << 20;
    for (size_t got = step; got == step;) {
      const size_t have = data.size();
      if (have > (size_t(1) << 31)) throw Error("the file is larger than any network");
      data.resize(have + step);
      got = std::fread(data.data() + have, 1, step, file.get());
      data.resize(have + got);
    }
    if (std::ferror(file.get()) != 0) {
      std::snprintf(message, sizeof(message), "%s: cannot be read", path);
      return SODFAST_ERROR_FILE;
    }
    static const char empty = 0;
    return sodfast_open_memory(data.empty() ? &empty : data.data(), data.size(), threads, network);
  });
}

sodfast_status sodfast_describe(const sodfast_network* network, sodfast_description* description) {
  if (network == nullptr || description == nullptr) return refuse("network or description is null");
  const Header& header = network->plan.header();
  description->channels = static_cast<int32_t>(network->plan.in_channels());
  description->multiple = static_cast<int32_t>(network->plan.multiple());
  description->height = static_cast<int32_t>(header.height);
  description->width = static_cast<int32_t>(header.width);
  std::memcpy(description->mean, header.mean, sizeof(header.mean));
  std::memcpy(description->std, header.std, sizeof(header.std));
  return SODFAST_OK;
}

sodfast_status sodfast_run(sodfast_network* network, const float* image, int64_t batch, int64_t height, int64_t width,
                           float* logits) {
  if (network == nullptr || image == nullptr || logits == nullptr) return refuse("network, image or logits is null");
  if (batch < 0) return refuse("batch is negative");
  return guarded([&]() -> sodfast_status {
    struct Restore {
      Threads* before = current_threads;
      ~Restore() { current_threads = before; }
    } restore;
    current_threads = &network->threads;
    const sodfast::Parallel parallel{[](int64_t n, int64_t grain, sodfast::Parallel::Body body, void* context) {
      current_threads->run(n, grain, body, context);
    }};
    try {
      network->plan.run(image, logits, batch, height, width, parallel);
    } catch (const Error& error) {
      return refuse(error.what());
    }
    return SODFAST_OK;
  });
}

void sodfast_close(sodfast_network* network) { delete network; }

const char* sodfast_message(void) { return message; }
