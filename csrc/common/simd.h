// One vector type for every instruction set: Vec<float> is 16, 8 or 4 lanes wide, Vec<double> is one lane
// (float64 exists to prove the kernels by gradcheck, not to be fast).
//
// The instruction set follows from the compiler's flags; each kernel source is compiled once per set. Everything
// lives in an anonymous namespace, so that the linker can never merge code of two instruction sets.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace sodfast {
namespace {

template <class T>
struct Vec;

// ------------------------------------------------------------------------------------------------ AVX-512
#if defined(__AVX512VL__)
template <>
struct Vec<float> {
  static constexpr int64_t lanes = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm512_add_ps(a.v, b.v); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec<float> where_greater(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v);
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {  // vmaxps returns its second operand where one is NaN
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_max_ps(a.v, b.v), a.v);
}
inline Vec<float> max_or_second(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a.v, b.v); }
inline Vec<float> min_or_second(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a.v, b.v); }
inline float sum(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
inline Vec<float> keep(Vec<float> a, int64_t n) { return _mm512_maskz_mov_ps(Vec<float>::first(n), a.v); }
inline void interleave(Vec<float> even, Vec<float> odd, Vec<float>& low, Vec<float>& high) {
  const __m512i l = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i h = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  low = _mm512_permutex2var_ps(even.v, l, odd.v), high = _mm512_permutex2var_ps(even.v, h, odd.v);
}
inline void deinterleave(Vec<float> low, Vec<float> high, Vec<float>& even, Vec<float>& odd) {
  const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i o = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  even = _mm512_permutex2var_ps(low.v, e, high.v), odd = _mm512_permutex2var_ps(low.v, o, high.v);
}
inline Vec<float> prelu(Vec<float> x, Vec<float> slope) {  // one masked multiplication
  return _mm512_mask_mul_ps(x.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), x.v, slope.v);
}

// --------------------------------------------------------------------------------------------------- AVX2
#elif defined(__AVX2__)
template <>
struct Vec<float> {
  static constexpr int64_t lanes = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}
  static __m256i first(int64_t n) {
    alignas(32) static constexpr int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + 8 - n));
  }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm256_add_ps(a.v, b.v); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec<float> where_greater(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ));
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {
  return _mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
}
inline Vec<float> max_or_second(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a.v, b.v); }
inline Vec<float> min_or_second(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a.v, b.v); }
inline float sum(Vec<float> a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Vec<float> keep(Vec<float> a, int64_t n) {
  return _mm256_and_ps(a.v, _mm256_castsi256_ps(Vec<float>::first(n)));
}
inline void interleave(Vec<float> even, Vec<float> odd, Vec<float>& low, Vec<float>& high) {
  const __m256 l = _mm256_unpacklo_ps(even.v, odd.v), h = _mm256_unpackhi_ps(even.v, odd.v);
  low = _mm256_permute2f128_ps(l, h, 0x20), high = _mm256_permute2f128_ps(l, h, 0x31);
}
inline void deinterleave(Vec<float> low, Vec<float> high, Vec<float>& even, Vec<float>& odd) {
  const __m256 l = _mm256_permute2f128_ps(low.v, high.v, 0x20), h = _mm256_permute2f128_ps(low.v, high.v, 0x31);
  even = _mm256_shuffle_ps(l, h, 0x88), odd = _mm256_shuffle_ps(l, h, 0xdd);
}

// ----------------------------------------------------------------------------- SSE4.2 and NEON: four lanes
#else
template <>
struct Vec<float> {
  static constexpr int64_t lanes = 4;
#if defined(__SSE4_2__)
  using Register = __m128;
  static Register broadcast(float x) { return _mm_set1_ps(x); }
  static Register read(const float* p) { return _mm_loadu_ps(p); }
  static void write(float* p, Register r) { _mm_storeu_ps(p, r); }
#elif defined(__ARM_NEON)
  using Register = float32x4_t;
  static Register broadcast(float x) { return vdupq_n_f32(x); }
  static Register read(const float* p) { return vld1q_f32(p); }
  static void write(float* p, Register r) { vst1q_f32(p, r); }
#else
#error "sodfast needs SSE4.2 (x86-64-v2), AVX2, AVX-512 or NEON"
#endif
  Register v;
  Vec() = default;
  Vec(Register x) : v(x) {}
  Vec(float x) : v(broadcast(x)) {}
  static Vec load(const float* p) { return read(p); }
  static Vec load(const float* p, int64_t n) {
    float lane[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
    return read(lane);
  }
  void store(float* p) const { write(p, v); }
  void store(float* p, int64_t n) const {
    float lane[4];
    write(lane, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
  }
};
#if defined(__SSE4_2__)
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm_add_ps(a.v, b.v); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm_sub_ps(a.v, b.v); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm_mul_ps(a.v, b.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm_add_ps(_mm_mul_ps(a.v, b.v), c.v); }
inline Vec<float> where_greater(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
  return _mm_blendv_ps(no.v, yes.v, _mm_cmpgt_ps(a.v, b.v));
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {
  return _mm_blendv_ps(_mm_max_ps(a.v, b.v), a.v, _mm_cmpunord_ps(a.v, a.v));
}
inline Vec<float> max_or_second(Vec<float> a, Vec<float> b) { return _mm_max_ps(a.v, b.v); }
inline Vec<float> min_or_second(Vec<float> a, Vec<float> b) { return _mm_min_ps(a.v, b.v); }
inline float sum(Vec<float> a) {
  __m128 s = _mm_add_ps(a.v, _mm_movehl_ps(a.v, a.v));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline void interleave(Vec<float> even, Vec<float> odd, Vec<float>& low, Vec<float>& high) {
  low = _mm_unpacklo_ps(even.v, odd.v), high = _mm_unpackhi_ps(even.v, odd.v);
}
inline void deinterleave(Vec<float> low, Vec<float> high, Vec<float>& even, Vec<float>& odd) {
  even = _mm_shuffle_ps(low.v, high.v, 0x88), odd = _mm_shuffle_ps(low.v, high.v, 0xdd);
}
#else
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return vaddq_f32(a.v, b.v); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return vsubq_f32(a.v, b.v); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return vmulq_f32(a.v, b.v); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return vfmaq_f32(c.v, a.v, b.v); }
inline Vec<float> where_greater(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
  return vbslq_f32(vcgtq_f32(a.v, b.v), yes.v, no.v);
}
inline Vec<float> max(Vec<float> a, Vec<float> b) { return vmaxq_f32(a.v, b.v); }  // NEON's maximum keeps NaN
inline Vec<float> max_or_second(Vec<float> a, Vec<float> b) { return vmaxq_f32(a.v, b.v); }
inline Vec<float> min_or_second(Vec<float> a, Vec<float> b) { return vminq_f32(a.v, b.v); }
inline float sum(Vec<float> a) { return vaddvq_f32(a.v); }
inline void interleave(Vec<float> even, Vec<float> odd, Vec<float>& low, Vec<float>& high) {
  low = vzip1q_f32(even.v, odd.v), high = vzip2q_f32(even.v, odd.v);
}
inline void deinterleave(Vec<float> low, Vec<float> high, Vec<float>& even, Vec<float>& odd) {
  even = vuzp1q_f32(low.v, high.v), odd = vuzp2q_f32(low.v, high.v);
}
#endif
inline Vec<float> keep(Vec<float> a, int64_t n) {
  float lane[4];
  a.store(lane);
  return Vec<float>::load(lane, n);
}
#endif

// ------------------------------------------------------------------------------------------ float64, one lane
template <>
struct Vec<double> {
  static constexpr int64_t lanes = 1;
  double v;
  Vec() = default;
  Vec(double x) : v(x) {}
  static Vec load(const double* p) { return *p; }
  static Vec load(const double* p, int64_t) { return *p; }
  void store(double* p) const { *p = v; }
  void store(double* p, int64_t) const { *p = v; }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return a.v + b.v; }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return a.v - b.v; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return a.v * b.v; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a.v * b.v + c.v; }
inline Vec<double> where_greater(Vec<double> a, Vec<double> b, Vec<double> yes, Vec<double> no) {
  return a.v > b.v ? yes : no;
}
inline Vec<double> max(Vec<double> a, Vec<double> b) { return (a.v != a.v || a.v > b.v) ? a : b; }
inline Vec<double> max_or_second(Vec<double> a, Vec<double> b) { return a.v > b.v ? a : b; }
inline Vec<double> min_or_second(Vec<double> a, Vec<double> b) { return a.v < b.v ? a : b; }
inline double sum(Vec<double> a) { return a.v; }
inline Vec<double> keep(Vec<double> a, int64_t) { return a; }
inline void interleave(Vec<double> even, Vec<double> odd, Vec<double>& low, Vec<double>& high) {
  low = even, high = odd;
}
inline void deinterleave(Vec<double> low, Vec<double> high, Vec<double>& even, Vec<double>& odd) {
  even = low, odd = high;
}

// Keeps a value in its register: GCC would rather load it again for each use, and unaligned loads are dear.
template <class T>
inline void pin([[maybe_unused]] Vec<T>& a) {
#if defined(__AVX512VL__)
  if constexpr (Vec<T>::lanes > 1) asm("" : "+v"(a.v));
#elif defined(__x86_64__)
  if constexpr (Vec<T>::lanes > 1) asm("" : "+x"(a.v));
#endif
}

// For all: max_or_second and min_or_second are one instruction; where a is NaN they may give b, where b is NaN they
// give NaN. keep(a, n) has a's first n lanes and zeros. interleave gives even[0], odd[0], even[1] … in two vectors,
// deinterleave takes it apart.

// PReLU: x where x > 0, slope · x elsewhere (also for a negative slope, and NaN stays NaN).
template <class T>
inline Vec<T> prelu(Vec<T> x, Vec<T> slope) {
  return where_greater(x, Vec<T>(T(0)), x, x * slope);
}

// NaN stays NaN in all three.
template <class T>
inline Vec<T> relu(Vec<T> x) {
  return max_or_second(Vec<T>(T(0)), x);
}
template <class T>
inline Vec<T> relu6(Vec<T> x) {
  return min_or_second(Vec<T>(T(6)), relu(x));
}
// x · min(max(x + 3, 0), 6) / 6
template <class T>
inline Vec<T> hardswish(Vec<T> x) {
  const Vec<T> gate = fma(x, Vec<T>(T(1) / 6), Vec<T>(T(0.5)));
  return x * min_or_second(max_or_second(gate, Vec<T>(T(0))), Vec<T>(T(1)));
}

// The lanes p[index[0]], p[index[1]], …; each index is below `lanes`, and a whole vector at p is readable.
#if defined(__AVX512VL__)
inline Vec<float> permute(const float* p, const int32_t* index) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), _mm512_loadu_ps(p));
}
#elif defined(__AVX2__)
inline Vec<float> permute(const float* p, const int32_t* index) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
}
#else
inline Vec<float> permute(const float* p, const int32_t* index) {
  const float lane[4] = {p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
  return Vec<float>::load(lane);
}
#endif
inline Vec<double> permute(const double* p, const int32_t* index) { return p[*index]; }

// for_each_vector(n, f): f(x, whole) for x = 0, lanes, 2·lanes … below n; the last call may cover fewer lanes.
// f takes (int64_t x, int64_t count): count == Vec<T>::lanes in all calls but perhaps the last.
template <class T, class F>
inline void for_each_vector(int64_t n, const F& f) {
  constexpr int64_t lanes = Vec<T>::lanes;
  int64_t x = 0;
  for (; x + lanes <= n; x += lanes) f(x, lanes);
  if (x < n) f(x, n - x);
}
template <class T>
inline Vec<T> load(const T* p, int64_t count) {
  return count == Vec<T>::lanes ? Vec<T>::load(p) : Vec<T>::load(p, count);
}
template <class T>
inline void store(Vec<T> v, T* p, int64_t count) {
  count == Vec<T>::lanes ? v.store(p) : v.store(p, count);
}

// Asks for a row that will be wanted soon. Short rows among many buffers escape the hardware's prefetching.
template <class T>
inline void prefetch_row(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

// Registers decide the tile of a convolution: `outs` output channels times `vectors(outs)` vectors along the row.
struct Tile {
#if defined(__AVX512VL__)
  static constexpr int outs = 8;  // 32 registers: 8 × 3 accumulators, 3 inputs, 1 weight
  static constexpr int vectors(int o) { return o > 4 ? 3 : 4; }
  static constexpr int grad_outs = 4, grad_taps = 6;  // weight gradient: 4 × 6 accumulators, 4 + 1 inputs
  static constexpr int rows = 4;                      // depthwise: 9 weights, 4 accumulators, 3 inputs
#elif defined(__ARM_NEON)
  static constexpr int outs = 8;
  static constexpr int vectors(int o) { return o > 4 ? 3 : 4; }
  static constexpr int grad_outs = 4, grad_taps = 6, rows = 4;
#else
  static constexpr int outs = 6;  // 16 registers: 6 × 2 accumulators, 2 inputs, 1 weight
  static constexpr int vectors(int o) { return o > 4 ? 2 : 3; }
  static constexpr int grad_outs = 3, grad_taps = 4, rows = 2;
#endif
};

}  // namespace
}  // namespace sodfast
