/* allocations network.sodfast side: how many blocks a second run of a network allocates, with one thread and with two,
 * one image and three. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "sodfast.h"

static atomic_long count;

void* malloc(size_t size) {
  static void* (*next)(size_t);
  if (next == NULL) next = (void* (*)(size_t))dlsym(RTLD_NEXT, "malloc");
  atomic_fetch_add(&count, 1);
  return next(size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  static void* (*next)(size_t, size_t);
  if (next == NULL) next = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  atomic_fetch_add(&count, 1);
  return next(alignment, size);
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
      /* Which thread takes which part is chance: after a few calls each has had its buffers. */
      for (int run = 0; run < 20; ++run) {
        before = atomic_load(&count);
        if (sodfast_run(network, image, batch, side, side, logits) != SODFAST_OK) return puts(sodfast_message()), 1;
        if (run == 0 && atomic_load(&count) == before && batch == 1) return puts("the counter does not count"), 1;
      }
      printf("%ld\n", atomic_load(&count) - before);
    }
    sodfast_close(network);
  }
  return 0;
}
