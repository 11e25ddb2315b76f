/* allocations network.sodfast side: how many bytes the first run of a network needs at most (with one thread, one
 * image); then how many blocks a later run allocates, with one thread and with two, one image and three. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "sodfast.h"

static atomic_long count, bytes, peak;

static void* taken(void* p) {
  const long now = atomic_fetch_add(&bytes, (long)malloc_usable_size(p)) + (long)malloc_usable_size(p);
  atomic_fetch_add(&count, 1);
  if (now > atomic_load(&peak)) atomic_store(&peak, now);
  return p;
}

void* malloc(size_t size) {
  static void* (*next)(size_t);
  if (next == NULL) next = (void* (*)(size_t))dlsym(RTLD_NEXT, "malloc");
  return taken(next(size));
}
void* aligned_alloc(size_t alignment, size_t size) {
  static void* (*next)(size_t, size_t);
  if (next == NULL) next = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  return taken(next(alignment, size));
}

void free(void* p) {
  static void (*next)(void*);
  if (next == NULL) next = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  atomic_fetch_sub(&bytes, (long)malloc_usable_size(p));
  next(p);
}

int main(int argc, char** argv) {
  const int side = argc > 2 ? atoi(argv[2]) : 64;
  const size_t area = (size_t)side * (size_t)side;
  float *image = calloc(3 * 3 * area, sizeof(float)), *logits = calloc(3 * area, sizeof(float));
  for (int threads = 1; threads <= 2; ++threads) {
    sodfast_network* network;
    if (sodfast_open(argv[1], threads, &network) != SODFAST_OK) return puts(sodfast_message()), 1;
    for (int batch = 1; batch <= 3; batch += 2) {
      long before = 0;
      const long bytes_before = atomic_load(&bytes);
      atomic_store(&peak, bytes_before);
      /* Which thread takes which part is chance: after a few calls each has had its buffers. */
      for (int run = 0; run < 20; ++run) {
        before = atomic_load(&count);
        if (sodfast_run(network, image, batch, side, side, logits) != SODFAST_OK) return puts(sodfast_message()), 1;
        if (run == 0 && batch == 1 && threads == 1) printf("%ld\n", atomic_load(&peak) - bytes_before);
      }
      printf("%ld\n", atomic_load(&count) - before);
    }
    sodfast_close(network);
  }
  return 0;
}
