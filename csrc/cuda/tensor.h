// The tensor cores' smallest product of float16 or bfloat16 matrices, added up in float32: d[16][8] += a[16][8] ·
// b[8][8]. A warp works together. With g = lane / 4 and t = lane % 4, a lane has
//
//   of a   rows g and g + 8, columns 2 t and 2 t + 1
//   of b   rows 2 t and 2 t + 1, column g
//   of d   rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2 t and 2 t + 1
//
// (PTX: mma.m16n8k8.) Every lane of the warp calls.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/numbers.h"

namespace sodfast::cuda {

template <class T>
struct Fragment {
  Pack<T, 2> upper, lower;  // of a: rows g and g + 8
};

__device__ __forceinline__ void narrow(float x, float y, Pack<__half, 2>& out) {
  narrow(x, out.v[0]), narrow(y, out.v[1]);
}
__device__ __forceinline__ void narrow(float x, float y, Pack<__nv_bfloat16, 2>& out) {
  narrow(x, out.v[0]), narrow(y, out.v[1]);
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Fragment<T>& a, const Pack<T, 2>& b) {
#ifdef SODFAST_CUDA_ON_HOST
  const float rows[2][2] = {{widen(a.upper.v[0]), widen(a.upper.v[1])}, {widen(a.lower.v[0]), widen(a.lower.v[1])}};
  const float cols[2] = {widen(b.v[0]), widen(b.v[1])};
  on_host::multiply_add(d, rows, cols);
#else
  uint32_t words[3];
  memcpy(words, &a.upper, 4), memcpy(words + 1, &a.lower, 4), memcpy(words + 2, &b, 4);
  if constexpr (std::is_same_v<T, __half>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(words[0]), "r"(words[1]), "r"(words[2]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(words[0]), "r"(words[1]), "r"(words[2]));
#endif
}

}  // namespace sodfast::cuda
