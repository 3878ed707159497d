// A SIMD vector of compute lanes over memory of any storage dtype, for kernel files only (one object per ISA).
// Everything lives in an unnamed namespace: no symbol compiled for one ISA can be picked by the linker for another.
// Multiply and add stay apart on every ISA, so all of them give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "../../dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sk {
namespace SK_ISA {
namespace {

#if defined(__AVX2__)
template <class C>
constexpr int kVectorBytes = 32;
#else
template <class C>
constexpr int kVectorBytes = 16;
#if defined(__x86_64__)
// SSE2 cannot compare 64-bit integers, and GCC 12 fails on the code that would stand in for it.
template <>
constexpr int kVectorBytes<double> = 8;
#endif
#endif

// Compiler vectors: SSE2, AVX2 and NEON for float, every ISA for double. A mask is an integer vector of 0 and -1.
template <class C>
struct Vec {
  using KeyLane = typename Compute<C>::Key;
  typedef C Lanes __attribute__((vector_size(kVectorBytes<C>)));
  typedef KeyLane Key __attribute__((vector_size(kVectorBytes<C>)));
  using Mask = Key;
  static constexpr int N = kVectorBytes<C> / int(sizeof(C));

  Lanes v;

  static Vec set(C x) { return {x - Lanes{}}; }  // adding 0 would lose the sign of -0
  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }

  static Mask all() { return ~Mask{}; }
  static Mask first(int count) {
    Mask m;
    for (int i = 0; i < N; ++i) m[i] = i < count ? -1 : 0;
    return m;
  }
  static Key keys(KeyLane x) { return Key{} + x; }
};

template <class C>
inline typename Vec<C>::Mask greater(Vec<C> a, Vec<C> b) {
  return typename Vec<C>::Mask(a.v > b.v);
}
template <class C>
inline typename Vec<C>::Mask equal(Vec<C> a, Vec<C> b) {
  return typename Vec<C>::Mask(a.v == b.v);
}
template <class C>
inline typename Vec<C>::Mask greater_key(typename Vec<C>::Key a, typename Vec<C>::Key b) {
  return typename Vec<C>::Mask(a > b);
}
template <class C>
inline Vec<C> select(typename Vec<C>::Mask m, Vec<C> a, Vec<C> b) {
  return {m ? a.v : b.v};
}
template <class C>
inline Vec<C> zero_unless(typename Vec<C>::Mask m, Vec<C> a) {
  return {(typename Vec<C>::Lanes)(m & (typename Vec<C>::Key)a.v)};
}
// acc never is -0, so adding +0 in the other lanes changes nothing.
template <class C>
inline Vec<C> add_where(typename Vec<C>::Mask m, Vec<C> acc, Vec<C> x) {
  return acc + zero_unless<C>(m, x);
}
// a * b + c, rounded once where the instruction set can: for matrix products, never for merges.
template <class C>
inline Vec<C> multiply_add(Vec<C> a, Vec<C> b, Vec<C> c) {
#if defined(__AVX2__)
  if constexpr (sizeof(C) == 8) {
    return {(typename Vec<C>::Lanes)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
  } else {
    return {(typename Vec<C>::Lanes)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(C) == 8) {
    return {(typename Vec<C>::Lanes)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
  } else {
    return {(typename Vec<C>::Lanes)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
  }
#else
  return a * b + c;
#endif
}
template <class C>
inline Vec<C> square_root(Vec<C> a) {
#if defined(__AVX2__)
  if constexpr (sizeof(C) == 8) {
    return {(typename Vec<C>::Lanes)_mm256_sqrt_pd((__m256d)a.v)};
  } else {
    return {(typename Vec<C>::Lanes)_mm256_sqrt_ps((__m256)a.v)};
  }
#else
  for (int i = 0; i < Vec<C>::N; ++i) a.v[i] = sizeof(C) == 8 ? __builtin_sqrt(a.v[i]) : __builtin_sqrtf(float(a.v[i]));
  return a;
#endif
}
template <class C>
inline typename Vec<C>::Key bits(Vec<C> a) {
  return (typename Vec<C>::Key)a.v;
}
template <class C>
inline typename Vec<C>::Key magnitude(Vec<C> a) {
  return bits(a) & kMaxKey<typename Vec<C>::KeyLane>;
}
template <class C>
inline Vec<C> absolute(Vec<C> a) {
  return {(typename Vec<C>::Lanes)magnitude(a)};
}
template <class C>
inline typename Vec<C>::Key flip_sign(typename Vec<C>::Key a) {
  return a ^ ~kMaxKey<typename Vec<C>::KeyLane>;
}
template <class C>
inline typename Vec<C>::Key max_key(typename Vec<C>::Key a, typename Vec<C>::Key b) {
  return a > b ? a : b;
}
template <class C>
inline typename Vec<C>::Key zero_key_where(typename Vec<C>::Mask m, typename Vec<C>::Key a) {
  return a & ~m;
}
template <class C>
inline typename Vec<C>::Mask and_not(typename Vec<C>::Mask a, typename Vec<C>::Mask b) {
  return a & ~b;
}
template <class C>
inline bool any(typename Vec<C>::Mask m) {
#if defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#else
  typename Vec<C>::KeyLane found = 0;
  for (int i = 0; i < Vec<C>::N; ++i) found |= m[i];
  return found != 0;
#endif
}
// Lane-wise tallies, summed once at the end.
template <class C>
inline typename Vec<C>::Key tally(typename Vec<C>::Key acc, typename Vec<C>::Mask m) {
  return acc - m;
}
template <class C>
inline Vec<C> to_lanes(typename Vec<C>::Key a) {
  return {__builtin_convertvector(a, typename Vec<C>::Lanes)};
}
template <class C>
inline int64_t sum_keys(typename Vec<C>::Key a) {
  int64_t s = 0;
  for (int i = 0; i < Vec<C>::N; ++i) s += a[i];
  return s;
}
template <class C>
inline typename Vec<C>::KeyLane max_lane(typename Vec<C>::Key a) {
  auto m = a[0];
  for (int i = 1; i < Vec<C>::N; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
template <class C>
inline void store_keys(typename Vec<C>::Key a, typename Vec<C>::KeyLane* p) {
  memcpy(p, &a, sizeof a);
}
// Writes the chosen lanes side by side; up to N lanes past p may be overwritten. Few lanes are ever chosen.
template <class C>
inline int compress(typename Vec<C>::Mask m, typename Vec<C>::Key a, typename Vec<C>::KeyLane* p) {
  if (!any<C>(m)) return 0;
  int n = 0;
  for (int i = 0; i < Vec<C>::N; ++i) {
    p[n] = a[i];
    n -= int(m[i]);
  }
  return n;
}

#if defined(__AVX512F__)

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
inline __mmask16 greater_key<float>(__m512i a, __m512i b) {
  return _mm512_cmpgt_epi32_mask(a, b);
}
template <>
inline Vec<float> select<float>(__mmask16 m, Vec<float> a, Vec<float> b) {
  return {_mm512_mask_blend_ps(m, b.v, a.v)};
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

#endif  // __AVX512F__

template <class C>
inline Vec<C> zero_unless_finite(Vec<C> a) {
  return zero_unless<C>(greater_key<C>(Vec<C>::keys(kInfinityKey<typename Vec<C>::KeyLane>), magnitude(a)), a);
}

// ---- memory <-> lanes: load, store, and rounding to a storage dtype without leaving the register

template <class C>
inline Vec<C> load(const C* p) {
  Vec<C> x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class C>
inline void store(Vec<C> x, C* p) {
  memcpy(p, &x, sizeof x);
}

#if defined(__AVX512F__)
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
#else
typedef uint32_t Word __attribute__((vector_size(kVectorBytes<float>)));
typedef uint16_t HalfWord __attribute__((vector_size(kVectorBytes<float> / 2)));

inline Word widen(const void* p) {
  HalfWord h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Word);
}
inline void narrow(Word w, void* p) {
  const HalfWord h = __builtin_convertvector(w, HalfWord);
  memcpy(p, &h, sizeof h);
}
inline Vec<float> from_bits(Word w) { return {(Vec<float>::Lanes)w}; }

inline Vec<float> load(const BFloat16* p) { return from_bits(widen(p) << 16); }
inline Word bf16_bits(Vec<float> x) {
  // Round to nearest even. Every NaN that reaches here has a low half of 0 (see the AVX-512 form): nothing carries.
  const Word u = (Word)x.v;
  return u + 0x7FFF + ((u >> 16) & 1);
}
inline void store(Vec<float> x, BFloat16* p) { narrow(bf16_bits(x) >> 16, p); }
inline Vec<float> round_to(Vec<float> x, BFloat16) { return from_bits(bf16_bits(x) & 0xFFFF0000); }

#if defined(__F16C__)
inline Vec<float> load(const Half* p) {
  return {(Vec<float>::Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
inline void store(Vec<float> x, Half* p) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec<float> round_to(Vec<float> x, Half) {
  const __m128i h = _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {(Vec<float>::Lanes)_mm256_cvtph_ps(h)};
}
#elif defined(__aarch64__)
inline Vec<float> load(const Half* p) {
  return {(Vec<float>::Lanes)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
}
inline void store(Vec<float> x, Half* p) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.v))); }
inline Vec<float> round_to(Vec<float> x, Half) {
  return {(Vec<float>::Lanes)vcvt_f32_f16(vcvt_f16_f32((float32x4_t)x.v))};
}
#else
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
inline Vec<float> round_to(Vec<float> x, Half) { return half_to_float(float_to_half(x)); }
#endif
#endif  // __AVX512F__

inline Vec<float> round_to(Vec<float> x, float) { return x; }
inline Vec<double> round_to(Vec<double> x, double) { return x; }

// The first `count` < N elements, 0 in the other lanes.
template <class S>
inline Vec<typename Compute<S>::type> load(const S* p, int count) {
  S full[Vec<typename Compute<S>::type>::N] = {};
  memcpy(full, p, size_t(count) * sizeof(S));
  return load(full);
}

// ---- blocks of two vectors, the unit of every kernel loop

template <class C>
struct Block {
  static constexpr int N = 2 * Vec<C>::N;
  Vec<C> v[2];
};

template <class S>
inline Block<typename Compute<S>::type> load_block(const S* p) {
  return {load(p), load(p + Vec<typename Compute<S>::type>::N)};
}
template <class S>
inline void store_block(Block<typename Compute<S>::type> x, S* p) {
  store(x.v[0], p);
  store(x.v[1], p + Vec<typename Compute<S>::type>::N);
}

template <class S>
constexpr bool kInterleaved = false;
template <>
inline constexpr bool kInterleaved<BFloat16> = true;

// bfloat16 is the upper half of float32: one vector takes the even elements, the other the odd ones, and no lane moves.
#if defined(__AVX512F__)
inline Block<float> load_block(const BFloat16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return {{{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
           {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))))}}};
}
inline void store_block(Block<float> x, BFloat16* p) {
  const __m512i even = _mm512_srli_epi32(bf16_bits(x.v[0]), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, even, bf16_bits(x.v[1])));
}
#else
inline Block<float> load_block(const BFloat16* p) {
  Word both;
  memcpy(&both, p, sizeof both);
  return {{from_bits(both << 16), from_bits(both & 0xFFFF0000)}};
}
inline void store_block(Block<float> x, BFloat16* p) {
  const Word both = (bf16_bits(x.v[0]) >> 16) | (bf16_bits(x.v[1]) & 0xFFFF0000);
  memcpy(p, &both, sizeof both);
}
#endif

// The first `count` elements of a block; the other lanes are 0 and are not written.
template <class S>
inline Block<typename Compute<S>::type> load_block(const S* p, int count) {
  S full[Block<typename Compute<S>::type>::N] = {};
  memcpy(full, p, size_t(count) * sizeof(S));
  return load_block(full);
}
template <class S>
inline void store_block(Block<typename Compute<S>::type> x, S* p, int count) {
  S full[Block<typename Compute<S>::type>::N];
  store_block(x, full);
  memcpy(p, full, size_t(count) * sizeof(S));
}
// The lanes of vector `half` that hold them.
template <class S>
inline typename Vec<typename Compute<S>::type>::Mask lanes_of(int half, int count) {
  using V = Vec<typename Compute<S>::type>;
  const int lanes = kInterleaved<S> ? (count + 1 - half) / 2 : count - half * V::N;
  return V::first(lanes < 0 ? 0 : lanes < V::N ? lanes : V::N);
}

// Past the caches: the line is not read before it is written. Both pointers must be aligned to 64 bytes.
template <size_t bytes>
inline void stream_lines(const void* lines, void* p) {
#if defined(__AVX512F__)
  for (size_t i = 0; i < bytes; i += 64) _mm512_stream_si512((__m512i*)p + i / 64, ((const __m512i*)lines)[i / 64]);
#elif defined(__AVX2__)
  for (size_t i = 0; i < bytes; i += 32) _mm256_stream_si256((__m256i*)p + i / 32, ((const __m256i*)lines)[i / 32]);
#elif defined(__x86_64__)
  for (size_t i = 0; i < bytes; i += 16) _mm_stream_si128((__m128i*)p + i / 16, ((const __m128i*)lines)[i / 16]);
#else
  memcpy(p, lines, bytes);
#endif
}
template <class S>
inline void stream_block(Block<typename Compute<S>::type> x, S* p) {
  alignas(64) S lines[Block<typename Compute<S>::type>::N];
  store_block(x, lines);
  stream_lines<sizeof lines>(lines, p);
}
// Makes streamed stores visible to other threads before the kernel returns.
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
