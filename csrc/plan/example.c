/* Finds the salient object in a picture, without Python:
 *
 *   example network.sodfast photo.ppm map.pgm [threads]
 *
 * photo.ppm is binary (P6, 8 bits a channel); map.pgm (P5) has the photo's size, 0 background … 255 salient. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "sodfast.h"

/* Channel c of the picture at (y, x), both fractions, its border repeated; 0 … 255. */
static float sample(const float* plane, int height, int width, float y, float x) {
  y = fminf(fmaxf(y, 0), (float)(height - 1)), x = fminf(fmaxf(x, 0), (float)(width - 1));
  const int y0 = (int)y, x0 = (int)x;
  const int y1 = y0 + 1 < height ? y0 + 1 : y0, x1 = x0 + 1 < width ? x0 + 1 : x0;
  const float v = y - (float)y0, u = x - (float)x0;
  const float above = (1 - u) * plane[y0 * width + x0] + u * plane[y0 * width + x1];
  const float below = (1 - u) * plane[y1 * width + x0] + u * plane[y1 * width + x1];
  return (1 - v) * above + v * below;
}

static void resize(const float* from, int h, int w, float* to, int height, int width) {
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      to[y * width + x] = sample(from, h, w, ((float)y + 0.5f) * (float)h / (float)height - 0.5f,
                                 ((float)x + 0.5f) * (float)w / (float)width - 0.5f);
}

/* Three planes of a P6 file, to be freed; null where it is none. */
static float* read_ppm(const char* path, int* height, int* width) {
  FILE* file = fopen(path, "rb");
  if (file == NULL) return NULL;
  int most = 0;
  float* planes = NULL;
  if (fscanf(file, "P6 %d %d %d", width, height, &most) == 3 && fgetc(file) != EOF && most == 255 && *width > 0 &&
      *height > 0 && *width <= 16384 && *height <= 16384) {
    const size_t area = (size_t)*width * (size_t)*height;
    planes = malloc(3 * area * sizeof(float));
    for (size_t i = 0; planes != NULL && i < 3 * area; ++i) {
      const int value = fgetc(file);
      if (value == EOF) {
        free(planes);
        planes = NULL;
        break;
      }
      planes[i % 3 * area + i / 3] = (float)value;
    }
  }
  fclose(file);
  return planes;
}

static int fail(const char* what, const char* why) {
  fprintf(stderr, "example: %s: %s\n", what, why);
  return 1;
}

int main(int argc, char** argv) {
  if (argc < 4) return fail("usage", "example network.sodfast photo.ppm map.pgm [threads]");
  sodfast_network* network;
  if (sodfast_open(argv[1], argc > 4 ? atoi(argv[4]) : 1, &network) != SODFAST_OK)
    return fail(argv[1], sodfast_message());
  sodfast_description about;
  sodfast_describe(network, &about);
  if (about.channels != 3) return fail(argv[1], "the network wants more than colours");

  int height, width;
  float* photo = read_ppm(argv[2], &height, &width);
  if (photo == NULL) return fail(argv[2], "not a binary PPM file with 8 bits a channel");
  const size_t area = (size_t)about.height * (size_t)about.width, full = (size_t)height * (size_t)width;
  float *input = malloc(3 * area * sizeof(float)), *map = malloc(area * sizeof(float));
  float* result = malloc(full * sizeof(float));
  if (input == NULL || map == NULL || result == NULL) return fail(argv[2], "there is not enough memory");
  for (int c = 0; c < 3; ++c) {
    float* plane = input + (size_t)c * area;
    resize(photo + (size_t)c * full, height, width, plane, about.height, about.width);
    for (size_t i = 0; i < area; ++i) plane[i] = (plane[i] / 255 - about.mean[c]) / about.std[c];
  }
  if (sodfast_run(network, input, 1, about.height, about.width, map) != SODFAST_OK)
    return fail(argv[1], sodfast_message());
  for (size_t i = 0; i < area; ++i) map[i] = 255 / (1 + expf(-map[i]));
  resize(map, about.height, about.width, result, height, width);

  FILE* file = fopen(argv[3], "wb");
  if (file == NULL) return fail(argv[3], "cannot be written");
  fprintf(file, "P5\n%d %d\n255\n", width, height);
  for (size_t i = 0; i < full; ++i) fputc((int)(result[i] + 0.5f), file);
  if (fclose(file) != 0) return fail(argv[3], "cannot be written");
  free(photo), free(input), free(map), free(result);
  sodfast_close(network);
  return 0;
}
