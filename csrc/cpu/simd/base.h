// What every machine has, SSE2 on x86-64: compiler vectors of 128 bits, and float16 by integer arithmetic.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "words.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr bool kConvertsHalf = false;  // in few instructions
constexpr bool kFuses = false;         // multiply_add rounds twice

#if defined(__x86_64__)
template <>
inline uint32_t bits_of_lanes<float>(Vec<float>::Mask m) {
  return uint32_t(_mm_movemask_ps((__m128)m));
}
#endif

inline Vec<float> half_to_float(Word h) {
  const Word magnitude = (h & 0x7FFF) << 13;
  // The exponent is rebiased by a multiplication, which also normalises subnormals.
  const Vec<float> scaled = from_bits(magnitude) * Vec<float>::set(0x1p112f);
  const Word special = (Word)(magnitude >= (0x7C00u << 13));
  const Word bits = (special & (magnitude | 0x7F800000)) | (~special & (Word)scaled.v);
  return from_bits(bits | (h & 0x8000) << 16);
}
inline Word float_to_half(Vec<float> x) {
  const Word u = (Word)x.v, a = u & 0x7FFFFFFF;
  const Word normal = (a + 0xC8000FFF + ((a >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a subnormal's bits, correctly rounded, in the low mantissa.
  const Word subnormal = (Word)(from_bits(a) + Vec<float>::set(0.5f)).v - 0x3F000000;
  const Word is_nan = (Word)(a > 0x7F800000), is_big = (Word)(a >= 0x47800000), is_small = (Word)(a < 0x38800000);
  Word h = (is_small & subnormal) | (~is_small & normal);
  h = (is_big & 0x7C00) | (~is_big & h);
  h = (is_nan & (0x7E00 | ((a >> 13) & 0x3FF))) | (~is_nan & h);
  return h | ((u >> 16) & 0x8000);
}
inline Vec<float> load(const Half* p) { return half_to_float(widen(p)); }
inline void store(Vec<float> x, Half* p) { narrow(float_to_half(x), p); }
inline Shorts magnitudes(Block<float> x, Half) {
  Half stored[Shorts::N];
  Shorts shorts;
  for (int h = 0; h < 2; ++h) store(x.v[h], stored + h * Vec<float>::N);
  memcpy(&shorts, stored, sizeof shorts);
  return {shorts.v & 0x7FFF};
}
inline Vec<float> round_to(Vec<float> x, Half) { return half_to_float(float_to_half(x)); }

template <size_t bytes>
inline void stream_lines(const void* lines, void* p) {
#if defined(__x86_64__)
  for (size_t i = 0; i < bytes; i += 16) _mm_stream_si128((__m128i*)p + i / 16, ((const __m128i*)lines)[i / 16]);
#else
  memcpy(p, lines, bytes);
#endif
}
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
