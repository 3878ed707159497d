// AVX2: compiler vectors of 256 bits, and F16C for float16.
#pragma once
#include "avx2_double.h"
#include "words.h"

namespace sk {
namespace SK_ISA {
namespace {

template <>
inline Vec<float> multiply_add<float>(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {(Vec<float>::Lanes)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
}
template <>
inline Vec<float> square_root<float>(Vec<float> a) {
  return {(Vec<float>::Lanes)_mm256_sqrt_ps((__m256)a.v)};
}
template <>
inline bool any<float>(Vec<float>::Mask m) {
  return !_mm256_testz_si256((__m256i)m, (__m256i)m);
}

template <>
inline uint32_t bits_of_lanes<float>(Vec<float>::Mask m) {
  return uint32_t(_mm256_movemask_ps((__m256)m));
}

inline Vec<float> load(const Half* p) {
  return {(Vec<float>::Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
inline void store(Vec<float> x, Half* p) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Shorts magnitudes(Block<float> x, Half) {
  const auto stored = [&](int h) {
    return _mm256_cvtps_ph((__m256)x.v[h].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  };
  return {(Shorts::Lanes)_mm256_setr_m128i(stored(0), stored(1)) & 0x7FFF};
}
inline Vec<float> round_to(Vec<float> x, Half) {
  const __m128i h = _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {(Vec<float>::Lanes)_mm256_cvtph_ps(h)};
}

template <size_t bytes>
inline void stream_lines(const void* lines, void* p) {
  for (size_t i = 0; i < bytes; i += 32) _mm256_stream_si256((__m256i*)p + i / 32, ((const __m256i*)lines)[i / 32]);
}
inline void fence() { _mm_sfence(); }

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
