// e^x and 1 / (1 + e^-x), to about one unit in the last place of float; NaN stays NaN.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace sodfast {
namespace {

// 2^n from round(n) + 1.5 · 2^23, whose low bits are the integer n; and the quotient.
#if defined(__AVX512VL__)
inline Vec<float> power_of_two(Vec<float> n) {
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(n.v), 23), _mm512_set1_epi32(127 << 23)));
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm512_div_ps(a.v, b.v); }
#elif defined(__AVX2__)
inline Vec<float> power_of_two(Vec<float> n) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(n.v), 23), _mm256_set1_epi32(127 << 23)));
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm256_div_ps(a.v, b.v); }
#elif defined(__SSE4_2__)
inline Vec<float> power_of_two(Vec<float> n) {
  return _mm_castsi128_ps(_mm_add_epi32(_mm_slli_epi32(_mm_castps_si128(n.v), 23), _mm_set1_epi32(127 << 23)));
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm_div_ps(a.v, b.v); }
#else
inline Vec<float> power_of_two(Vec<float> n) {
  return vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(n.v), 23), vdupq_n_s32(127 << 23)));
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return vdivq_f32(a.v, b.v); }
#endif

// e^x for x ≤ 88; e^-87 is the last that is not 0 further down.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  // e^x = 2^n e^r, |r| ≤ ln 2 / 2.
  x = where_greater(V(-88.0f), x, V(-88.0f), x);
  const V shifted = fma(x, V(1.44269504f), V(12582912.0f)), n = shifted - V(12582912.0f);
  const V r = fma(n, V(2.12194440e-4f), fma(n, V(-0.693359375f), x));
  // Taylor's series of degree 7: its rest is below 6e-9 there.
  V e = fma(r, V(1.0f / 5040), V(1.0f / 720));
  e = fma(e, r, V(1.0f / 120));
  e = fma(e, r, V(1.0f / 24));
  e = fma(e, r, V(1.0f / 6));
  e = fma(e, r, V(0.5f));
  e = fma(e, r, V(1.0f));
  e = fma(e, r, V(1.0f));
  return e * power_of_two(shifted);
}
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return a.v / b.v; }
inline Vec<double> exp(Vec<double> x) { return std::exp(x.v); }

inline Vec<float> sigmoid(Vec<float> x) {
  using V = Vec<float>;
  const V y = V(0.0f) - x;  // from 88 on the result is 0 to float's precision
  return V(1.0f) / (exp(where_greater(y, V(88.0f), V(88.0f), y)) + V(1.0f));
}
inline Vec<double> sigmoid(Vec<double> x) { return 1 / (1 + std::exp(-x.v)); }

}  // namespace
}  // namespace sodfast
