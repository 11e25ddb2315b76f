// Numbers as they are stored and as kernels compute with them: float16, bfloat16 and float32 in float32.
#pragma once

#include <cstring>

#include "cuda/launch.h"
#include "cuda/kernels.h"

namespace sodfast::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16(x); }

// The type a kernel adds up in.
template <class T>
struct Sum {
  using type = float;
};

#ifdef SODFAST_CUDA_ON_HOST  // float64 proves the kernels' mathematics; no network is trained in it on a GPU
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(double x, float& out) { out = static_cast<float>(x); }
template <>
struct Sum<double> {
  using type = double;
};
#endif

// Several numbers that one access moves; the address must be a multiple of its size.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T v[n];
};

// A pack as it travels from memory, where it may as well be zero: left to itself the compiler puts one of half
// precision together number by number.
template <class T, int n>
struct __attribute__((__may_alias__, __aligned__(sizeof(T) * n))) Words {
  uint32_t v[sizeof(T) * n / 4];
};
template <int n, class T>
__device__ __forceinline__ Words<T, n> words_at(const T* p) {
  return *reinterpret_cast<const Words<T, n>*>(p);
}
template <class T, int n>
__device__ __forceinline__ Pack<T, n> pack_of(const Words<T, n>& words) {
  Pack<T, n> pack;
  memcpy(&pack, &words, sizeof pack);
  return pack;
}
template <class T, int n>
__device__ __forceinline__ const Pack<T, n>& pack_of(const Pack<T, n>& pack) {
  return pack;
}

// Four numbers at once. A bfloat16 is the upper half of a float32: one instruction each, where they come in pairs.
template <class T, class A>
__device__ __forceinline__ void widen(const Pack<T, 4>& pack, A (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = widen(pack.v[i]);
}
__device__ __forceinline__ void widen(const Pack<__nv_bfloat16, 4>& pack, float (&v)[4]) {
  uint32_t pairs[2], bits[4];
  memcpy(pairs, &pack, sizeof pack);
#pragma unroll
  for (int i = 0; i < 2; ++i) bits[2 * i] = pairs[i] << 16, bits[2 * i + 1] = pairs[i] & 0xffff0000u;
  memcpy(v, bits, sizeof v);
}
template <class T, class A>
__device__ __forceinline__ void narrow(const A (&v)[4], Pack<T, 4>& pack) {
#pragma unroll
  for (int i = 0; i < 4; ++i) narrow(v[i], pack.v[i]);
}
#ifdef __CUDA_ARCH__
__device__ __forceinline__ void narrow(const float (&v)[4], Pack<__half, 4>& pack) {
  const __half2 pairs[2] = {__floats2half2_rn(v[0], v[1]), __floats2half2_rn(v[2], v[3])};
  memcpy(&pack, pairs, sizeof pack);
}
__device__ __forceinline__ void narrow(const float (&v)[4], Pack<__nv_bfloat16, 4>& pack) {
  const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v[0], v[1]), __floats2bfloat162_rn(v[2], v[3])};
  memcpy(&pack, pairs, sizeof pack);
}
#endif

// Calls f(T()) with the C++ type that `type` names, and returns what it returns.
template <class F>
cudaError_t for_type(Type type, const F& f) {
  switch (type) {
    case Type::f32:
      return f(float());
    case Type::f16:
      return f(__half());
    case Type::bf16:
      return f(__nv_bfloat16());
#ifdef SODFAST_CUDA_ON_HOST
    case Type::f64:
      return f(double());
#endif
    default:
      return cudaErrorInvalidValue;
  }
}

// One number per channel whose type is known only at run time; read and written once per block and channel.
template <class A>
__device__ __forceinline__ A get(const Vector& v, int64_t i) {
  switch (v.type) {
    case Type::f16:
      return widen(static_cast<const __half*>(v.data)[i]);
    case Type::bf16:
      return widen(static_cast<const __nv_bfloat16*>(v.data)[i]);
    case Type::f64:
      return static_cast<A>(static_cast<const double*>(v.data)[i]);
    default:
      return static_cast<const float*>(v.data)[i];
  }
}
template <class A>
__device__ __forceinline__ void put(const Vector& v, int64_t i, A x) {
  switch (v.type) {
    case Type::f16:
      return narrow(static_cast<float>(x), static_cast<__half*>(v.data)[i]);
    case Type::bf16:
      return narrow(static_cast<float>(x), static_cast<__nv_bfloat16*>(v.data)[i]);
    case Type::f64:
      static_cast<double*>(v.data)[i] = x;
      return;
    default:
      static_cast<float*>(v.data)[i] = static_cast<float>(x);
  }
}

// The smaller and the larger of two numbers; NaN where there is one. In float32 one instruction, where the conditions
// are four.
template <class A>
__device__ __forceinline__ A smaller(A a, A b) {
  return b < a || b != b ? b : a;
}
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return b > a || b != b ? b : a;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ float smaller(float a, float b) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
template <>
__device__ __forceinline__ float larger(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
#endif

// PReLU: x where x > 0, slope · x elsewhere (also for a negative slope, and NaN stays NaN).
template <class A>
__device__ __forceinline__ A prelu(A x, A slope) {
  return x > 0 ? x : slope * x;
}

template <class I>
constexpr __host__ __device__ I divide_up(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
constexpr __host__ __device__ I least(I a, I b) {
  return a < b ? a : b;
}

// Behind this the compiler knows nothing of i. Left to itself it works out every way to read a source before the first
// loop, and keeps all of that in registers through the multiplication.
__device__ __forceinline__ void recompute(int& i) { asm volatile("" : "+r"(i)); }

// i / d and the rest, in 32 bits where both fit: a division of 64-bit numbers costs a hundred instructions.
__device__ __forceinline__ int64_t divide(int64_t i, int64_t d, int64_t& rest) {
  if (((i | d) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(i) / static_cast<uint32_t>(d);
    rest = static_cast<uint32_t>(i) - q * static_cast<uint32_t>(d);
    return q;
  }
  rest = i % d;
  return i / d;
}

// The scale that a block works on: first[s] is the first block of scale s, first[scales] the number of all.
struct BlockRanges {
  int64_t first[max_scales + 1] = {};
  __device__ __forceinline__ int find(int64_t block, int scales, int64_t& rest) const {
    int s = 0;
    while (s + 1 < scales && block >= first[s + 1]) ++s;
    rest = block - first[s];
    return s;
  }
};

}  // namespace sodfast::cuda
