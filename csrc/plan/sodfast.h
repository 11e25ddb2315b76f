/* sodfast without Python: opens a .sodfast file (sodfast.fuse(model).save(...)) and finds salient objects with it.
 *
 *   sodfast_network* network;
 *   if (sodfast_open("csnet.sodfast", 1, &network) != SODFAST_OK) puts(sodfast_message());
 *   sodfast_run(network, image, 1, 224, 224, logits);
 *   sodfast_close(network);
 *
 * example.c is a whole program. Float32 on the CPU; nothing but the C++ runtime and threads is needed. */
#ifndef SODFAST_H
#define SODFAST_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SODFAST_API __attribute__((visibility("default")))
#else
#define SODFAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sodfast_status {
  SODFAST_OK = 0,
  SODFAST_ERROR_ARGUMENT = 1, /* a null pointer, a wrong size */
  SODFAST_ERROR_FILE = 2,     /* the file cannot be read */
  SODFAST_ERROR_FORMAT = 3,   /* it is no .sodfast file, of another version, or damaged */
  SODFAST_ERROR_MEMORY = 4,
  SODFAST_ERROR_INTERNAL = 5
} sodfast_status;

typedef struct sodfast_network sodfast_network;

typedef struct sodfast_description {
  int32_t channels;      /* of the image, RGB first */
  int32_t multiple;      /* height and width must be multiples of it */
  int32_t height, width; /* what the network was trained for, in pixels */
  float mean[8], std[8]; /* per channel: the network wants (value - mean) / std for values from 0 to 1 */
} sodfast_description;

/* Opens a file, or its bytes (they may be freed afterwards), for `threads` threads per call, the calling one
 * included; 1 to 256. *network is null after an error. */
SODFAST_API sodfast_status sodfast_open(const char* path, int threads, sodfast_network** network);
SODFAST_API sodfast_status sodfast_open_memory(const void* data, size_t size, int threads, sodfast_network** network);

SODFAST_API sodfast_status sodfast_describe(const sodfast_network* network, sodfast_description* description);

/* image: [batch][channels][height][width], normalised; logits: [batch][height][width]; the saliency is their logistic
 * function. Several threads may call this on one network; while the network's own threads are busy with one call, the
 * others use their own thread alone. After the first call of a size nothing is allocated. */
SODFAST_API sodfast_status sodfast_run(sodfast_network* network, const float* image, int64_t batch, int64_t height,
                                       int64_t width, float* logits);

/* Null is allowed. No call may be running. */
SODFAST_API void sodfast_close(sodfast_network* network);

/* What went wrong in this thread's latest call that failed, as a sentence. */
SODFAST_API const char* sodfast_message(void);

#ifdef __cplusplus
}
#endif
#endif
