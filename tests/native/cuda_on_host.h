// Runs CUDA kernels on the host, for tests: a .cu file compiled by a C++ compiler with -DSODFAST_CUDA_ON_HOST takes
// this header in place of CUDA's. Blocks run one after the other; the threads of a block are fibres that switch where
// they wait for each other (__syncthreads, __syncwarp, the shuffles). Blocks, and between two barriers the fibres, run
// in an order drawn anew, so that a kernel which forgot a barrier gives wrong numbers here too, and a barrier that not
// all reach ends the program. AddressSanitizer is told of every switch, and so is ThreadSanitizer (cuda_races.h).
//
// What it offers is what csrc/cuda uses: one-dimensional grids and blocks, static shared memory, warps of 32 in full
// masks, float16 and bfloat16 as stored numbers. No atomics, no textures, no streams that overlap.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// ------------------------------------------------------------------------------------- CUDA's words
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidValue = 1;
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "refused"; }

namespace sodfast::on_host {

struct Index {
  unsigned x = 0;
};
inline Index thread, block, block_size, grid_size;

}  // namespace sodfast::on_host

#define threadIdx sodfast::on_host::thread
#define blockIdx sodfast::on_host::block
#define blockDim sodfast::on_host::block_size
#define gridDim sodfast::on_host::grid_size

// --------------------------------------------------------------------------------------- half types
// Stored numbers with CUDA's names; rounding to nearest even, as the hardware's.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  const float sign = (x.bits & 0x8000) ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}
inline __half __float2half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  const auto with_sign = [sign](int bits) { return __half{static_cast<uint16_t>(sign | bits)}; };
  if (x != x) return {0x7fff};
  if (a >= 65520.0f) return with_sign(0x7c00);
  int exponent = -14;
  if (a >= std::ldexp(1.0f, -14)) exponent = std::ilogb(a);
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));  // may carry into the exponent
  return with_sign(exponent == -14 && mantissa < 1024 ? mantissa : ((exponent + 15) << 10) + mantissa - 1024);
}

// ------------------------------------------------------------------------------------------- fibres
namespace sodfast::on_host {

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "cuda_on_host: block %u: %s\n", block.x, why);
  std::abort();
}

#if defined(__x86_64__)
// Saves the callee's registers on the stack, swaps stacks, restores them.
__attribute__((naked, noinline)) SODFAST_UNWATCHED inline void swap_stacks(void** /*from: rdi*/, void* /*to: rsi*/) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline char block_begins, block_ends;  // where the scheduler and all threads meet

class Fibre {
 public:
  static constexpr size_t stack_size = 256 * 1024;
  enum class State { ready, at_block_barrier, at_warp_barrier, finished };
  State state = State::finished;

  Fibre() : stack_(static_cast<char*>(std::aligned_alloc(64, stack_size))) {
    if (stack_ == nullptr) stop("no memory for stacks");
  }
  Fibre(const Fibre&) = delete;
  ~Fibre() {
    std::free(stack_);
    watch_no_more(watched_);
  }

  void start(const std::function<void()>* body) {
    body_ = body, state = State::ready;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + stack_size);
    *--top = nullptr;  // where the entry would return to; also aligns the stack as a call would
    *--top = reinterpret_cast<void*>(&Fibre::entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    own_ = top;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_, own_.uc_stack.ss_size = stack_size, own_.uc_link = nullptr;
    makecontext(&own_, &Fibre::entry, 0);
#endif
  }

  // From the scheduler: runs until the fibre waits or is finished.
  SODFAST_UNWATCHED void resume() {
    current() = this;
    scheduler_watched() = watched();
    before_switch(&scheduler_stack(), stack_, stack_size);
    watch(watched_);
#if defined(__x86_64__)
    swap_stacks(&scheduler(), own_);
#else
    swapcontext(&scheduler(), &own_);
#endif
    after_switch(scheduler_stack(), nullptr, nullptr);
  }

  // From the fibre: back to the scheduler.
  SODFAST_UNWATCHED static void wait(State why) {
    Fibre& me = *current();
    me.state = why;
    before_switch(why == State::finished ? nullptr : &me.fake_stack_, host_bottom(), host_size());
    watch(scheduler_watched());
#if defined(__x86_64__)
    swap_stacks(&me.own_, scheduler());
#else
    swapcontext(&me.own_, &scheduler());
#endif
    after_switch(me.fake_stack_, nullptr, nullptr);
  }

 private:
  SODFAST_UNWATCHED static void entry() {
    after_switch(nullptr, &host_bottom(), &host_size());
    enter(&block_begins);
    (*current()->body_)();
    leave(&block_ends);
    wait(State::finished);
    stop("a finished fibre ran on");
  }
  static void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom,
                            [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, bottom, size);
#endif
  }
  static void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom,
                           [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, bottom, size);
#endif
  }
#if defined(__x86_64__)
  using Context = void*;
#else
  using Context = ucontext_t;
#endif
  static Context& scheduler() {
    static Context context{};
    return context;
  }
  static Fibre*& current() {
    static Fibre* fibre = nullptr;
    return fibre;
  }
  static void*& scheduler_stack() {
    static void* fake = nullptr;
    return fake;
  }
  static const void*& host_bottom() {
    static const void* bottom = nullptr;
    return bottom;
  }
  static size_t& host_size() {
    static size_t size = 0;
    return size;
  }
  static Watched& scheduler_watched() {
    static Watched scheduler{};
    return scheduler;
  }
  char* stack_;
  Context own_{};
  const std::function<void()>* body_ = nullptr;
  void* fake_stack_ = nullptr;
  Watched watched_ = watch_new();
};

// ---------------------------------------------------------------------------------------- the block
constexpr unsigned warp_size = 32, most_threads = 1024;
inline uint64_t shuffle_slots[most_threads];

// Two places where its threads meet, in turn: who leaves one must not meet those that are already at the next.
struct Barrier {
  unsigned passed = 0;
  char places[2] = {};
};
inline Barrier block_barrier, warp_barriers[most_threads / warp_size];

SODFAST_UNWATCHED inline void meet(Barrier& barrier, Fibre::State why) {
  char* place = &barrier.places[barrier.passed % 2];
  leave(place);
  Fibre::wait(why);
  enter(place);
}

inline unsigned draw(unsigned below) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((state >> 33) % below);
}
inline void shuffle(std::vector<unsigned>& order) {
  for (size_t n = order.size(); n > 1; --n) std::swap(order[n - 1], order[draw(static_cast<unsigned>(n))]);
}

// Lets a barrier's threads go on once all of them are there. `first` to `last` are the threads it is for.
SODFAST_UNWATCHED inline bool release(std::vector<std::unique_ptr<Fibre>>& fibres, unsigned first, unsigned last,
                                      Fibre::State why, Barrier& barrier) {
  unsigned waiting = 0, finished = 0;
  for (unsigned t = first; t < last; ++t) {
    waiting += fibres[t]->state == why;
    finished += fibres[t]->state == Fibre::State::finished;
  }
  if (waiting == 0 || waiting + finished < last - first) return false;
  if (finished > 0) stop("some threads ended, the others wait for them at a barrier");
  for (unsigned t = first; t < last; ++t) fibres[t]->state = Fibre::State::ready;
  ++barrier.passed;
  return true;
}

SODFAST_UNWATCHED inline void run_block(unsigned threads, const std::function<void()>& body) {
  static std::vector<std::unique_ptr<Fibre>> fibres;
  while (fibres.size() < threads) fibres.push_back(std::make_unique<Fibre>());
  static std::vector<unsigned> order;
  order.resize(threads);
  soil_shared_memory();
  leave(&block_begins);
  for (unsigned t = 0; t < threads; ++t) {
    fibres[t]->start(&body);
    order[t] = t;
  }
  for (;;) {
    shuffle(order);
    unsigned alive = 0;
    for (const unsigned t : order) {
      thread.x = t;
      if (fibres[t]->state == Fibre::State::ready) fibres[t]->resume();
      alive += fibres[t]->state != Fibre::State::finished;
    }
    if (alive == 0) break;
    bool released = release(fibres, 0, threads, Fibre::State::at_block_barrier, block_barrier);
    for (unsigned warp = 0; warp < threads / warp_size; ++warp)
      released |=
          release(fibres, warp * warp_size, (warp + 1) * warp_size, Fibre::State::at_warp_barrier, warp_barriers[warp]);
    if (!released) stop("threads wait at different barriers");
  }
  enter(&block_ends);
}

template <class T>
SODFAST_UNWATCHED T exchange(T value, unsigned from_lane) {
  static_assert(sizeof(T) <= 8);
  const unsigned me = thread.x;
  std::memcpy(&shuffle_slots[me], &value, sizeof(T));
  Fibre::wait(Fibre::State::at_warp_barrier);
  const unsigned source = me / warp_size * warp_size + from_lane % warp_size;
  if (source < block_size.x) std::memcpy(&value, &shuffle_slots[source], sizeof(T));
  Fibre::wait(Fibre::State::at_warp_barrier);
  return value;
}

// What csrc/cuda/tensor.h says of the tensor cores. Eight products and what they are added to are one sum, which is cut
// off, not rounded: so the hardware does, but for a few bits more or less.
SODFAST_UNWATCHED inline void multiply_add(float (&d)[4], const float (&a)[2][2], const float (&b)[2]) {
  static float rows[most_threads / warp_size][16][8], cols[most_threads / warp_size][8][8];
  const unsigned lane = thread.x % warp_size, g = lane / 4, t = lane % 4;
  auto& left = rows[thread.x / warp_size];
  auto& right = cols[thread.x / warp_size];
  for (unsigned i = 0; i < 2; ++i) {
    left[g][2 * t + i] = a[0][i], left[g + 8][2 * t + i] = a[1][i];
    right[2 * t + i][g] = b[i];
  }
  Fibre::wait(Fibre::State::at_warp_barrier);
  for (unsigned i = 0; i < 4; ++i) {
    double sum = d[i];
    for (unsigned n = 0; n < 8; ++n) sum += double(left[g + 8 * (i / 2)][n]) * double(right[n][2 * t + i % 2]);
    d[i] = static_cast<float>(sum);
    if (std::isfinite(d[i]) && std::fabs(double(d[i])) > std::fabs(sum)) d[i] = std::nextafter(d[i], 0.0f);
  }
  Fibre::wait(Fibre::State::at_warp_barrier);
}

template <class... Parameters, class... Arguments>
void run_grid(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, const Arguments&... arguments) {
  if (threads == 0 || threads > most_threads || threads % warp_size != 0) stop("a block must have 32 to 1024 threads");
  const std::function<void()> body = [&] { kernel(arguments...); };
  grid_size.x = blocks, block_size.x = threads;
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  shuffle(order);
  for (const unsigned b : order) {
    block.x = b;
    run_block(threads, body);
  }
}

}  // namespace sodfast::on_host

inline void __syncthreads() {
  sodfast::on_host::meet(sodfast::on_host::block_barrier, sodfast::on_host::Fibre::State::at_block_barrier);
}
inline void __syncwarp() {
  sodfast::on_host::meet(sodfast::on_host::warp_barriers[sodfast::on_host::thread.x / sodfast::on_host::warp_size],
                         sodfast::on_host::Fibre::State::at_warp_barrier);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return sodfast::on_host::exchange(value, sodfast::on_host::thread.x % 32 ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return sodfast::on_host::exchange(value, static_cast<unsigned>(lane));
}
