// A vector that begins within one vector and ends in the next: lanes start, start + 1, … of the two side by side,
// for a `start` from 0 (all of the first) to `lanes` (all of the second).
//
//   Window<T> w(start);   w.join(w.turn(low), w.turn(high))
//
// In a sweep each vector is turned once and joined twice, with either neighbour.
#pragma once

#include "common/simd.h"

namespace sodfast {
namespace {

template <class T>
class Window;

#if defined(__AVX512VL__)
template <>
class Window<float> {
 public:
  explicit Window(int64_t start)
      : lane_(_mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                               _mm512_set1_epi32(static_cast<int>(start)))) {}
  Vec<float> turn(Vec<float> v) const { return v; }
  Vec<float> join(Vec<float> low, Vec<float> high) const { return _mm512_permutex2var_ps(low.v, lane_, high.v); }

 private:
  __m512i lane_;
};

#elif defined(__AVX2__)
template <>
class Window<float> {
 public:
  explicit Window(int64_t start)
      : lane_(_mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(start)))),
        in_high_(_mm256_castsi256_ps(_mm256_cmpgt_epi32(lane_, _mm256_set1_epi32(7)))) {}
  Vec<float> turn(Vec<float> v) const { return _mm256_permutevar8x32_ps(v.v, lane_); }  // lane numbers modulo 8
  Vec<float> join(Vec<float> low, Vec<float> high) const { return _mm256_blendv_ps(low.v, high.v, in_high_); }

 private:
  __m256i lane_;
  __m256 in_high_;
};

#elif defined(__SSE4_2__)
template <>
class Window<float> {
 public:
  explicit Window(int64_t start) {
    const __m128i byte = _mm_add_epi8(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm_set1_epi8(static_cast<char>(4 * start)));
    byte_ = _mm_and_si128(byte, _mm_set1_epi8(15));
    in_high_ = _mm_castsi128_ps(_mm_cmpgt_epi8(byte, _mm_set1_epi8(15)));
  }
  Vec<float> turn(Vec<float> v) const { return _mm_castsi128_ps(_mm_shuffle_epi8(_mm_castps_si128(v.v), byte_)); }
  Vec<float> join(Vec<float> low, Vec<float> high) const { return _mm_blendv_ps(low.v, high.v, in_high_); }

 private:
  __m128i byte_;
  __m128 in_high_;
};

#else  // NEON
template <>
class Window<float> {
 public:
  explicit Window(int64_t start) {
    uint8_t byte[16];
    uint32_t in_high[4];
    for (int64_t i = 0; i < 16; ++i) byte[i] = static_cast<uint8_t>((4 * start + i) % 16);
    for (int64_t i = 0; i < 4; ++i) in_high[i] = start + i >= 4 ? ~0u : 0u;
    byte_ = vld1q_u8(byte), in_high_ = vld1q_u32(in_high);
  }
  Vec<float> turn(Vec<float> v) const { return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v.v), byte_)); }
  Vec<float> join(Vec<float> low, Vec<float> high) const { return vbslq_f32(in_high_, high.v, low.v); }

 private:
  uint8x16_t byte_;
  uint32x4_t in_high_;
};
#endif

template <>
class Window<double> {
 public:
  explicit Window(int64_t start) : high_(start > 0) {}
  Vec<double> turn(Vec<double> v) const { return v; }
  Vec<double> join(Vec<double> low, Vec<double> high) const { return high_ ? high : low; }

 private:
  bool high_;
};

}  // namespace
}  // namespace sodfast
