// Floating-point numbers as integers of the same order, so that a maximum is one integer instruction, and a vector
// knows which of its lanes won. A key travels in a Vec as a bit pattern: it may be loaded, stored and compared here,
// never added.
//
//   key_of(x)   order as of x; -0 = 0; every NaN is above infinity        value_of(key_of(x)) = x
//
// The bits of a number that is not negative are their own key. Lane bits: bit i is that of lane i.
#pragma once

#include <cstring>

#include "common/simd.h"

namespace sodfast {
namespace {

using LaneBits = uint16_t;

// Below every key: the border of a maximum.
template <class T>
constexpr T lowest_key() {
  return T(-0.0);
}

// Per instruction set: turn_negative(x) turns the bits below the sign around where the sign is set; nan_on_top(x,
// key) is the highest key where x is NaN; without_sign(x); max_key, greater_key: of keys; where: by lane bits.
#if defined(__AVX512VL__)
inline Vec<float> turn_negative(Vec<float> x) {
  const __m512i b = _mm512_castps_si512(x.v);
  return _mm512_castsi512_ps(_mm512_xor_si512(b, _mm512_srli_epi32(_mm512_srai_epi32(b, 31), 1)));
}
inline Vec<float> nan_on_top(Vec<float> x, Vec<float> key) {
  return _mm512_mask_mov_ps(key.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q),
                            _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff)));
}
inline Vec<float> without_sign(Vec<float> x) { return _mm512_abs_ps(x.v); }
inline Vec<float> max_key(Vec<float> a, Vec<float> b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
}
inline LaneBits greater_key(Vec<float> a, Vec<float> b) {
  return _mm512_cmpgt_epi32_mask(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v));
}
inline Vec<float> where(LaneBits bits, Vec<float> yes, Vec<float> no) {
  return _mm512_mask_blend_ps(bits, no.v, yes.v);
}

#elif defined(__AVX2__)
inline Vec<float> turn_negative(Vec<float> x) {
  const __m256i b = _mm256_castps_si256(x.v);
  return _mm256_castsi256_ps(_mm256_xor_si256(b, _mm256_srli_epi32(_mm256_srai_epi32(b, 31), 1)));
}
inline Vec<float> nan_on_top(Vec<float> x, Vec<float> key) {
  return _mm256_blendv_ps(key.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)),
                          _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
}
inline Vec<float> without_sign(Vec<float> x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v); }
inline Vec<float> max_key(Vec<float> a, Vec<float> b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
}
inline LaneBits greater_key(Vec<float> a, Vec<float> b) {
  return static_cast<LaneBits>(
      _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))));
}
inline Vec<float> where(LaneBits bits, Vec<float> yes, Vec<float> no) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
  return _mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(set));
}

#elif defined(__SSE4_2__)
inline Vec<float> turn_negative(Vec<float> x) {
  const __m128i b = _mm_castps_si128(x.v);
  return _mm_castsi128_ps(_mm_xor_si128(b, _mm_srli_epi32(_mm_srai_epi32(b, 31), 1)));
}
inline Vec<float> nan_on_top(Vec<float> x, Vec<float> key) {
  return _mm_blendv_ps(key.v, _mm_castsi128_ps(_mm_set1_epi32(0x7fffffff)), _mm_cmpunord_ps(x.v, x.v));
}
inline Vec<float> without_sign(Vec<float> x) { return _mm_andnot_ps(_mm_set1_ps(-0.0f), x.v); }
inline Vec<float> max_key(Vec<float> a, Vec<float> b) {
  return _mm_castsi128_ps(_mm_max_epi32(_mm_castps_si128(a.v), _mm_castps_si128(b.v)));
}
inline LaneBits greater_key(Vec<float> a, Vec<float> b) {
  return static_cast<LaneBits>(
      _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(_mm_castps_si128(a.v), _mm_castps_si128(b.v)))));
}
inline Vec<float> where(LaneBits bits, Vec<float> yes, Vec<float> no) {
  const __m128i lane = _mm_setr_epi32(1, 2, 4, 8);
  const __m128i set = _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(bits), lane), lane);
  return _mm_blendv_ps(no.v, yes.v, _mm_castsi128_ps(set));
}

#else  // NEON
inline Vec<float> turn_negative(Vec<float> x) {
  const int32x4_t b = vreinterpretq_s32_f32(x.v);
  const uint32x4_t below = vshrq_n_u32(vreinterpretq_u32_s32(vshrq_n_s32(b, 31)), 1);
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_s32(b), below));
}
inline Vec<float> nan_on_top(Vec<float> x, Vec<float> key) {
  return vbslq_f32(vceqq_f32(x.v, x.v), key.v, vreinterpretq_f32_u32(vdupq_n_u32(0x7fffffff)));
}
inline Vec<float> without_sign(Vec<float> x) { return vabsq_f32(x.v); }
inline Vec<float> max_key(Vec<float> a, Vec<float> b) {
  return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a.v), vreinterpretq_s32_f32(b.v)));
}
inline uint32x4_t lane_numbers() {
  const uint32_t lane[4] = {1, 2, 4, 8};
  return vld1q_u32(lane);
}
inline LaneBits greater_key(Vec<float> a, Vec<float> b) {
  const uint32x4_t set = vcgtq_s32(vreinterpretq_s32_f32(a.v), vreinterpretq_s32_f32(b.v));
  return static_cast<LaneBits>(vaddvq_u32(vandq_u32(set, lane_numbers())));
}
inline Vec<float> where(LaneBits bits, Vec<float> yes, Vec<float> no) {
  return vbslq_f32(vtstq_u32(vdupq_n_u32(bits), lane_numbers()), yes.v, no.v);
}
#endif

// ------------------------------------------------------------------------------------------ float64, one lane
inline int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline double from_bits(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline Vec<double> turn_negative(Vec<double> x) {
  return from_bits(bits_of(x.v) < 0 ? bits_of(x.v) ^ INT64_MAX : bits_of(x.v));
}
inline Vec<double> nan_on_top(Vec<double> x, Vec<double> key) { return x.v == x.v ? key.v : from_bits(INT64_MAX); }
inline Vec<double> without_sign(Vec<double> x) { return from_bits(bits_of(x.v) & INT64_MAX); }
inline Vec<double> max_key(Vec<double> a, Vec<double> b) { return bits_of(a.v) > bits_of(b.v) ? a : b; }
inline LaneBits greater_key(Vec<double> a, Vec<double> b) { return bits_of(a.v) > bits_of(b.v); }
inline Vec<double> where(LaneBits bits, Vec<double> yes, Vec<double> no) { return bits ? yes : no; }

template <class T>
inline Vec<T> key_of(Vec<T> x) {
  return nan_on_top(x, turn_negative(x + Vec<T>(T(0))));
}
template <class T>
inline Vec<T> value_of(Vec<T> key) {
  return turn_negative(key);
}
inline LaneBits first_lanes(int64_t n) { return static_cast<LaneBits>((1u << n) - 1); }

}  // namespace
}  // namespace sodfast
