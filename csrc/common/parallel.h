// How kernels run in parallel without knowing by whom: the caller hands in a loop (torch's pool in csrc/bind,
// a plain loop in the native tests), the kernel hands it a body.
#pragma once

#include <cstdint>

namespace sodfast {

struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  // Runs body on disjoint ranges that cover [0, n); a range has at least `grain` items where n allows it.
  void (*run)(int64_t n, int64_t grain, Body body, void* context);

  template <class F>
  void operator()(int64_t n, int64_t grain, const F& f) const {
    if (n <= 0) return;
    run(
        n, grain < 1 ? 1 : grain,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<F*>(&f));
  }
};

// Items per range so that a range is worth a thread: about 50 µs of work at one multiply-add per element.
inline int64_t grain_for(int64_t work_per_item) {
  constexpr int64_t worth_a_thread = 1 << 19;
  return work_per_item < 1 ? worth_a_thread : 1 + worth_a_thread / work_per_item;
}

}  // namespace sodfast
