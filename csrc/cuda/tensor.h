// The tensor cores' smallest product of matrices, added up in float32: d[16][8] += a[16][8] · b[8][8]. A warp works
// together. With g = lane / 4 and t = lane % 4, a lane has
//
//   of a   rows g and g + 8, two columns          of d   rows g (d[0], d[1]) and g + 8 (d[2], d[3]),
//   of b   two rows, column g                            columns 2 t and 2 t + 1
//
// The two are neighbours along the sum, 2 t and 2 t + 1; any order serves in which a and b agree. (PTX: mma.m16n8k8.)
// Every lane of the warp calls.
//
// What float16 and bfloat16 hold is multiplied as it is. Of float32 tensor cores read the upper 11 of 24 bits (TF32).
// So a number is split in two of 11 bits, x = big + small, and of the four products all but small · small are added:
// what is missing is 2^-21 of a product at most, 2^-23 in the mean. Tensor cores cut sums off where others round; so
// eight products make a sum of their own, which is then added as float32 numbers are, and errors do not all point to
// zero. An infinity or a NaN has no rest: it takes part in big · big alone, so that nothing is multiplied that was not
// there (but a number under 2^-137 has no big part, and makes NaN of an infinity).
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/numbers.h"

namespace sodfast::cuda {

// Whether float32 is multiplied so too: where three such products take less time than one float32 multiplication per
// lane. On the large data-centre GPUs TF32 has 8 times the rate and more, on others not three times.
inline bool float32_on_tensor_cores() {
#if defined(SODFAST_CUDA_ON_HOST)
  return true;  // float64 runs what the others run
#elif defined(__CUDACC__)
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return false;
  return major == 8 ? minor == 0 : major == 9 || major == 10;  // A100, H100, H200, B200
#endif
}

#if defined(SODFAST_CUDA_ON_HOST) || defined(__CUDACC__)
// Calls f(std::bool_constant) with whether tensor cores multiply what is stored as T, and returns what it returns.
template <class T, class F>
cudaError_t on_tensor_cores(const F& f) {
  if constexpr (sizeof(T) == 2) return f(std::true_type());
  if constexpr (std::is_same_v<T, float>)
    if (float32_on_tensor_cores()) return f(std::true_type());
  if constexpr (sizeof(T) != 2) return f(std::false_type());
}
#endif

// Two neighbours along the sum.
template <class T>
struct Pair {
  Pack<T, 2> stored;
  Pair() = default;
  __device__ __forceinline__ Pair(float x, float y) { narrow(x, stored.v[0]), narrow(y, stored.v[1]); }
};
template <>
struct Pair<float> {
  float whole[2], big[2], small[2];  // whole: big, infinities and NaN
  Pair() = default;
  __device__ __forceinline__ Pair(float x, float y) { split(0, x), split(1, y); }

 private:
  __device__ __forceinline__ void split(int i, float x) {
    const bool finite = fabsf(x) <= 3.4011621e38f;  // what rounds to an infinity is cut off like one
    const float part = finite ? x : 0.0f;
    uint32_t bits;
    memcpy(&bits, &part, 4);
    bits = (bits + 0x1000) & ~0x1fffu;  // to 11 bits, halves away from zero
    memcpy(&big[i], &bits, 4);
    small[i] = part - big[i], whole[i] = finite ? big[i] : x;
  }
};

template <class T>
struct Fragment {
  Pair<T> upper, lower;  // of a: rows g and g + 8
};

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Fragment<T>& a, const Pair<T>& b) {
#ifdef SODFAST_CUDA_ON_HOST
  const auto &upper = a.upper.stored.v, &lower = a.lower.stored.v, &right = b.stored.v;
  on_host::multiply_add(d, {{widen(upper[0]), widen(upper[1])}, {widen(lower[0]), widen(lower[1])}},
                        {widen(right[0]), widen(right[1])});
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

// The upper 11 bits of float32 numbers.
__device__ __forceinline__ void multiply_add(float (&d)[4], const float (&upper)[2], const float (&lower)[2],
                                             const float (&b)[2]) {
#ifdef SODFAST_CUDA_ON_HOST
  const auto read = [](float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4), bits &= x == x ? ~0x1fffu : ~0u, memcpy(&x, &bits, 4);
    return x;
  };
  on_host::multiply_add(d, {{read(upper[0]), read(upper[1])}, {read(lower[0]), read(lower[1])}},
                        {read(b[0]), read(b[1])});
#else
  const auto bits = [](float x) { return __float_as_uint(x); };
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(bits(upper[0])), "r"(bits(lower[0])), "r"(bits(upper[1])), "r"(bits(lower[1])), "r"(bits(b[0])),
        "r"(bits(b[1])));
#endif
}
template <>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Fragment<float>& a, const Pair<float>& b) {
  float eight[4] = {};
  multiply_add(eight, a.upper.small, a.lower.small, b.big);
  multiply_add(eight, a.upper.big, a.lower.big, b.small);
  multiply_add(eight, a.upper.whole, a.lower.whole, b.whole);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += eight[i];
}

}  // namespace sodfast::cuda
