// Races between the threads of a block, for kernels that cuda_on_host.h runs: compiled with -fsanitize=thread, its
// fibres are threads to ThreadSanitizer, which only the barriers put in order. Of two accesses to one address, one of
// them a write, with no barrier between them it reports both, in whatever order they ran and whatever came out. As CUDA
// has it,
// __syncthreads and __syncwarp order accesses to memory; shuffles and tensor cores only pass values on. Blocks count as
// ordered: what two of them do to the same address is not seen.
//
// And since the tool can find all of shared memory here, every block begins with it full of NaN and -1: what reads a
// place that its block has not written gives wrong numbers.
//
// Without ThreadSanitizer all of this is nothing.
#pragma once

#if defined(__SANITIZE_THREAD__)

#include <link.h>
#include <sanitizer/tsan_interface.h>

#include <cstdint>

#define __shared__ static thread_local                            // all of it in one piece, for `soil_shared_memory`
#define SODFAST_UNWATCHED __attribute__((no_sanitize("thread")))  // accesses of the harness, not of a kernel

namespace sodfast::on_host {

using Watched = void*;  // a thread, as ThreadSanitizer knows it
inline Watched watch_new() { return __tsan_create_fiber(0); }
inline void watch_no_more(Watched thread) { __tsan_destroy_fiber(thread); }
inline Watched watched() { return __tsan_get_current_fiber(); }
// What follows is the work of `thread`.
SODFAST_UNWATCHED inline void watch(Watched thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }

// What any thread did before its `leave(place)` comes before all that one does after its `enter(place)`.
inline void leave(void* place) { __tsan_release(place); }
inline void enter(void* place) { __tsan_acquire(place); }

SODFAST_UNWATCHED inline int soil_first(dl_phdr_info* program, size_t, void*) {
  for (int i = 0; i < program->dlpi_phnum; ++i) {
    if (program->dlpi_phdr[i].p_type != PT_TLS || program->dlpi_tls_data == nullptr) continue;
    uint64_t* word = static_cast<uint64_t*>(program->dlpi_tls_data);
    for (size_t n = program->dlpi_phdr[i].p_memsz / sizeof *word; n > 0; --n) *word++ = ~uint64_t(0);
  }
  return 1;  // the rest are libraries
}
inline void soil_shared_memory() { dl_iterate_phdr(soil_first, nullptr); }

}  // namespace sodfast::on_host

#else

#define __shared__ static  // blocks run one after the other; AddressSanitizer knows where each array ends
#define SODFAST_UNWATCHED

namespace sodfast::on_host {

struct Watched {};
inline Watched watch_new() { return {}; }
inline void watch_no_more(Watched) {}
inline Watched watched() { return {}; }
inline void watch(Watched) {}
inline void leave(void*) {}
inline void enter(void*) {}
inline void soil_shared_memory() {}

}  // namespace sodfast::on_host

#endif
