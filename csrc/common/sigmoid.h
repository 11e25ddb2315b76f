// e^x and 1 / (1 + e^-x), to about one unit in the last place of float, e^x to four where |x| nears 88; NaN stays NaN.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace sodfast {
namespace {

// times_power_of_two(e, shifted): e · 2^n for n = shifted - 1.5 · 2^23, an integer that shifted's low bits hold too; 0
// for n below -126. And the quotient.
#if defined(__AVX512VL__)
inline Vec<float> times_power_of_two(Vec<float> e, Vec<float> shifted) {
  const Vec<float> n = shifted - Vec<float>(12582912.0f);
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-127.0f), _CMP_NLE_UQ), e.v, n.v);
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm512_div_ps(a.v, b.v); }
#elif defined(__AVX2__)
inline Vec<float> times_power_of_two(Vec<float> e, Vec<float> shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return e * Vec<float>(_mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(127 << 23))));
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm256_div_ps(a.v, b.v); }
#elif defined(__SSE4_2__)
inline Vec<float> times_power_of_two(Vec<float> e, Vec<float> shifted) {
  const __m128i n = _mm_slli_epi32(_mm_castps_si128(shifted.v), 23);
  return e * Vec<float>(_mm_castsi128_ps(_mm_add_epi32(n, _mm_set1_epi32(127 << 23))));
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm_div_ps(a.v, b.v); }
#else
inline Vec<float> times_power_of_two(Vec<float> e, Vec<float> shifted) {
  const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v), 23);
  return e * Vec<float>(vreinterpretq_f32_s32(vaddq_s32(n, vdupq_n_s32(127 << 23))));
}
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return vdivq_f32(a.v, b.v); }
#endif

// e^x for x ≤ 88; e^-87 is the last that is not 0 further down.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  // e^x = 2^n e^r, |r| ≤ ln 2 / 2.
  x = max_or_second(V(-88.0f), x);
  const V shifted = fma(x, V(1.44269504f), V(12582912.0f)), n = shifted - V(12582912.0f);
  // Where products are rounded: a short ln 2, for which they are exact, and its rest. Else off by n · 1.9e-9.
#if defined(__SSE4_2__) && !defined(__FMA__)
  const V r = fma(n, V(2.12194440e-4f), fma(n, V(-0.693359375f), x));
#else
  const V r = fma(n, V(-0.693147181f), x);
#endif
  // The polynomial of degree 6 whose largest relative error there is smallest: 1.9e-9.
  V e = fma(r, V(1.38367945e-3f), V(8.37485678e-3f));
  e = fma(e, r, V(4.16682288e-2f));
  e = fma(e, r, V(1.66664198e-1f));
  e = fma(e, r, V(4.99999911e-1f));
  e = fma(e, r, V(1.0f));
  e = fma(e, r, V(1.0f));
  return times_power_of_two(e, shifted);
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
