// AVX-512: float in 512-bit registers with masks of bits; double as on AVX2.
#pragma once
#include "avx2_double.h"

namespace sk {
namespace SK_ISA {
namespace {

template <>
struct Vec<float> {
  using KeyLane = int32_t;
  using Key = __m512i;
  using Mask = __mmask16;
  static constexpr int N = 16;

  __m512 v;

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }

  static Mask all() { return 0xFFFF; }
  static Mask first(int count) { return Mask((1u << count) - 1); }
  static Key keys(int32_t x) { return _mm512_set1_epi32(x); }
};

template <>
inline __mmask16 greater<float>(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
}
template <>
inline __mmask16 equal<float>(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
template <>
inline __mmask16 not_at_most<float>(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
}
template <>
inline __mmask16 greater_key<float>(__m512i a, __m512i b) {
  return _mm512_cmpgt_epi32_mask(a, b);
}
template <>
inline Vec<float> select<float>(__mmask16 m, Vec<float> a, Vec<float> b) {
  return {_mm512_mask_blend_ps(m, b.v, a.v)};
}
template <>
inline __m512i select_key<float>(__mmask16 m, __m512i a, __m512i b) {
  return _mm512_mask_blend_epi32(m, b, a);
}
template <>
inline Vec<float> zero_unless<float>(__mmask16 m, Vec<float> a) {
  return {_mm512_maskz_mov_ps(m, a.v)};
}
template <>
inline Vec<float> add_where<float>(__mmask16 m, Vec<float> acc, Vec<float> x) {
  return {_mm512_mask_add_ps(acc.v, m, acc.v, x.v)};
}
template <>
inline Vec<float> multiply_add<float>(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
template <>
inline Vec<float> square_root<float>(Vec<float> a) {
  return {_mm512_sqrt_ps(a.v)};
}
template <>
inline __m512i bits<float>(Vec<float> a) {
  return _mm512_castps_si512(a.v);
}
template <>
inline __m512i magnitude<float>(Vec<float> a) {
  return _mm512_and_si512(bits(a), _mm512_set1_epi32(0x7FFFFFFF));
}
template <>
inline Vec<float> absolute<float>(Vec<float> a) {
  return {_mm512_abs_ps(a.v)};
}
template <>
inline __m512i flip_sign<float>(__m512i a) {
  return _mm512_xor_si512(a, _mm512_set1_epi32(int(0x80000000)));
}
template <>
inline __m512i max_key<float>(__m512i a, __m512i b) {
  return _mm512_max_epi32(a, b);
}
template <>
inline __m512i add_keys<float>(__m512i a, __m512i b) {
  return _mm512_add_epi32(a, b);
}
template <>
inline __m512i zero_key_where<float>(__mmask16 m, __m512i a) {
  return _mm512_maskz_mov_epi32(__mmask16(~m), a);
}
template <>
inline __mmask16 and_not<float>(__mmask16 a, __mmask16 b) {
  return __mmask16(a & ~b);
}
template <>
inline bool any<float>(__mmask16 m) {
  return m != 0;
}
template <>
inline uint32_t bits_of_lanes<float>(__mmask16 m) {
  return m;
}
template <>
inline __m512i tally<float>(__m512i acc, __mmask16 m) {
  return _mm512_mask_sub_epi32(acc, m, acc, _mm512_set1_epi32(-1));
}
template <>
inline Vec<float> to_lanes<float>(__m512i a) {
  return {_mm512_cvtepi32_ps(a)};
}
template <>
inline int64_t sum_keys<float>(__m512i a) {
  return _mm512_reduce_add_epi32(a);
}
template <>
inline int32_t max_lane<float>(__m512i a) {
  return _mm512_reduce_max_epi32(a);
}
template <>
inline void store_keys<float>(__m512i a, int32_t* p) {
  _mm512_storeu_si512(p, a);
}
// The register form: the form that writes memory is microcoded on Zen 4. Few lanes are chosen, so a short store,
// which seldom crosses a cache line, nearly always does.
template <>
inline int compress<float>(__mmask16 m, __m512i a, int32_t* p) {
  const __m512i chosen = _mm512_maskz_compress_epi32(m, a);
  const int count = __builtin_popcount(m);
  if (count <= 4) {
    _mm_storeu_si128((__m128i*)p, _mm512_castsi512_si128(chosen));
  } else {
    _mm512_storeu_si512(p, chosen);
  }
  return count;
}

inline Vec<float> load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline __m512i bf16_bits(Vec<float> x) {
  // Round to nearest even: add 0x7FFF, and one more where the last kept bit is set. Every NaN that reaches here
  // came from bfloat16 or is the default NaN, so its low half is 0 and nothing carries.
  const __m512i u = _mm512_castps_si512(x.v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
}
inline void store(Vec<float> x, BFloat16* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x), 16)));
}
inline Vec<float> round_to(Vec<float> x, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bf16_bits(x), _mm512_set1_epi32(int(0xFFFF0000))))};
}
inline Vec<float> load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store(Vec<float> x, Half* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec<float> round_to(Vec<float> x, Half) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

inline Block<float> load_block(const BFloat16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return {{{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
           {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))))}}};
}
inline void store_block(Block<float> x, BFloat16* p) {
  const __m512i even = _mm512_srli_epi32(bf16_bits(x.v[0]), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, even, bf16_bits(x.v[1])));
}

// The magnitudes of a block in a dtype of 16 bits, as integers; in any order.
struct Shorts {
  static constexpr int N = Block<float>::N;

  __m512i v;

  static Shorts set(int16_t x) { return {_mm512_set1_epi16(x)}; }
};
inline Shorts larger(Shorts a, Shorts b) { return {_mm512_max_epi16(a.v, b.v)}; }
inline Shorts tally_above(Shorts acc, Shorts a, Shorts bound) {
  return {_mm512_mask_sub_epi16(acc.v, _mm512_cmpgt_epi16_mask(a.v, bound.v), acc.v, _mm512_set1_epi16(-1))};
}
inline Shorts without_signs(__m512i x) { return {_mm512_and_si512(x, _mm512_set1_epi16(0x7FFF))}; }
// Of numbers that bfloat16 holds.
inline Shorts magnitudes(Block<float> x, BFloat16) {
  const __m512i even = _mm512_srli_epi32(bits(x.v[0]), 16);
  return without_signs(_mm512_mask_blend_epi16(0xAAAAAAAA, even, bits(x.v[1])));
}
inline Shorts magnitudes(Block<float> x, Half) {
  const auto stored = [&](int h) { return _mm512_cvtps_ph(x.v[h].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); };
  return without_signs(_mm512_inserti64x4(_mm512_castsi256_si512(stored(0)), stored(1), 1));
}

template <size_t bytes>
inline void stream_lines(const void* lines, void* p) {
  for (size_t i = 0; i < bytes; i += 64) _mm512_stream_si512((__m512i*)p + i / 64, ((const __m512i*)lines)[i / 64]);
}
inline void fence() { _mm_sfence(); }

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
