// The C API (sodfast.h).
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>

#include "plan/plan.h"
#include "plan/sodfast.h"
#include "plan/threads.h"

namespace sodfast::plan {
namespace {

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
      current_threads->run(n, grain, body, context, current_threads->size());
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
