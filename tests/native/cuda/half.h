// Kernels in half precision under the sanitizers: the arguments of a call in float32 once more, rounded, in blocks of
// exactly their size. What comes out is compared by the Python tests; here it must be a number wherever float32 has
// one.
#pragma once

#include <cmath>
#include <cstdlib>
#include <deque>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/kernels.h"
#include "cuda/numbers.h"

namespace sodfast::test {

// A number in half precision that converts as the numbers of Maps do.
template <class T>
struct Half : T {
  explicit Half(double x) { cuda::narrow(static_cast<float>(x), *this); }
  explicit operator double() const { return static_cast<double>(cuda::widen(*this)); }
};

template <class T>
class HalfCall {
 public:
  HalfCall(std::string name, cuda::Type as) : type(as), name_(std::move(name)) {}
  ~HalfCall() {
    for (const Result& r : results_)
      for (int64_t i = 0; i < r.n; ++i)
        if (std::isfinite(r.expected[i]) && std::isnan(static_cast<double>(r.block[i])))
          fail(name_ + " in half precision left or made NaN at", static_cast<double>(i), static_cast<double>(r.n));
    for (void* block : blocks_) std::free(block);
  }
  HalfCall(const HalfCall&) = delete;

  const void* copy(const float* p, int64_t n) {
    return p == nullptr ? nullptr : block(n, [&](int64_t i) { return p[i]; });
  }
  cuda::Pointers copies(const Pyramid& maps, const float* const* ps) {
    return list([&](int s) { return copy(ps[s], maps.batch * maps.channels[s] * maps.area(s)); }, maps.scales);
  }
  // Where the kernel writes what it wrote to `expected` in float32.
  void* result(const float* expected, int64_t n) {
    if (expected == nullptr) return nullptr;
    Half<T>* const written = block(n, [](int64_t) { return NAN; });
    results_.push_back({expected, written, n});
    return written;
  }
  cuda::MutablePointers results(const Pyramid& maps, const float* const* expected) {
    return list([&](int s) { return result(expected[s], maps.batch * maps.channels[s] * maps.area(s)); }, maps.scales);
  }
  // Numbers that stay float32 in mixed precision.
  cuda::Vector scratch(int64_t n) {
    auto* const p = static_cast<float*>(std::malloc(static_cast<size_t>(n) * sizeof(float)));
    blocks_.push_back(p);
    for (int64_t i = 0; i < n; ++i) p[i] = NAN;
    return {p, cuda::Type::f32};
  }
  template <class F>
  auto list(F f, int n) -> decltype(f(0))* {
    auto& made = lists_.emplace_back();
    for (int s = 0; s < n; ++s) made.push_back(const_cast<void*>(static_cast<const void*>(f(s))));
    return const_cast<decltype(f(0))*>(static_cast<void* const*>(made.data()));
  }

  const cuda::Type type;

 private:
  struct Result {
    const float* expected;
    const Half<T>* block;
    int64_t n;
  };
  template <class F>
  Half<T>* block(int64_t n, F f) {
    auto* const p = static_cast<Half<T>*>(std::malloc(static_cast<size_t>(n) * sizeof(T)));
    blocks_.push_back(p);
    for (int64_t i = 0; i < n; ++i) p[i] = Half<T>(static_cast<double>(f(i)));
    return p;
  }
  std::string name_;
  std::vector<Result> results_;
  std::vector<void*> blocks_;
  std::deque<std::vector<void*>> lists_;
};

// f(HalfCall) in float16 and in bfloat16.
template <class F>
void in_half(const char* name, F f) {
  HalfCall<__half> float16(std::string(name) + " float16", cuda::Type::f16);
  f(float16);
  HalfCall<__nv_bfloat16> bfloat16(std::string(name) + " bfloat16", cuda::Type::bf16);
  f(bfloat16);
}

}  // namespace sodfast::test
