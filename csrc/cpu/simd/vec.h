// A SIMD vector of compute lanes over memory of any storage dtype, for kernel files only (one object per ISA).
// Everything lives in an unnamed namespace: no symbol compiled for one ISA can be picked by the linker for another.
// Multiply and add stay apart on every ISA, so all of them give the same bits. A file per ISA gives the same names.
#pragma once
#include <type_traits>

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(__aarch64__)
#include "neon.h"
#else
#include "base.h"
#endif

namespace sk {
namespace SK_ISA {
namespace {

template <class C>
inline Vec<C> zero_unless_finite(Vec<C> a) {
  return zero_unless<C>(greater_key<C>(Vec<C>::keys(kInfinityKey<typename Vec<C>::KeyLane>), magnitude(a)), a);
}
// a * b + c, rounded once on every ISA; lane by lane, which is slow, where multiply_add rounds twice.
template <class C>
inline Vec<C> fused_multiply_add(Vec<C> a, Vec<C> b, Vec<C> c) {
  if constexpr (kFuses) {
    return multiply_add(a, b, c);
  } else {
    for (int i = 0; i < Vec<C>::N; ++i)
      c.v[i] = sizeof(C) == 8 ? __builtin_fma(a.v[i], b.v[i], c.v[i])
                              : __builtin_fmaf(float(a.v[i]), float(b.v[i]), float(c.v[i]));
    return c;
  }
}

inline Vec<float> round_to(Vec<float> x, float) { return x; }
inline Vec<double> round_to(Vec<double> x, double) { return x; }

// As round_to, in fewer instructions, where the result is a normal number of S or 0: numbers near x + 2^k x lie as far
// apart as those of S near x. 2^k x is exact, so that fusing changes nothing; past the range the result is not finite.
template <class S>
constexpr float kWiden = 1;  // 2^(precision of float - precision of S)
template <>
inline constexpr float kWiden<BFloat16> = 0x1p16f;
template <>
inline constexpr float kWiden<Half> = 0x1p13f;
template <class S>
inline Vec<float> round_normal(Vec<float> x) {
  using V = Vec<float>;
  if constexpr (kFuses) return multiply_add(x, V::set(-kWiden<S>), multiply_add(x, V::set(kWiden<S>), x));
  const V wide = x * V::set(kWiden<S>);
  return (x + wide) - wide;
}

// The first `count` < N elements, 0 in the other lanes.
template <class S>
inline Vec<typename Compute<S>::type> load(const S* p, int count) {
  S full[Vec<typename Compute<S>::type>::N] = {};
  memcpy(full, p, size_t(count) * sizeof(S));
  return load(full);
}

template <class S>
inline Block<typename Compute<S>::type> load_block(const S* p) {
  return {load(p), load(p + Vec<typename Compute<S>::type>::N)};
}
template <class S>
inline void store_block(Block<typename Compute<S>::type> x, S* p) {
  store(x.v[0], p);
  store(x.v[1], p + Vec<typename Compute<S>::type>::N);
}

// bfloat16 is the upper half of float32: one vector takes the even elements, the other the odd ones, and no lane moves.
template <class S>
constexpr bool kInterleaved = false;
template <>
inline constexpr bool kInterleaved<BFloat16> = true;

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

// The lanes of vector `half` whose bit is set; element i of the block at bit i.
template <class S>
inline typename Vec<typename Compute<S>::type>::Mask lanes_where(int half, uint32_t bits) {
  using V = Vec<typename Compute<S>::type>;
#if defined(__AVX512F__)
  if constexpr (std::is_integral_v<typename V::Mask>)
    return typename V::Mask(kInterleaved<S> ? _pext_u32(bits, 0x55555555u << half) : bits >> half * V::N);
  else
#endif
  {
    typename V::Key places;
    for (int l = 0; l < V::N; ++l)
      places[l] = typename V::KeyLane(1) << (kInterleaved<S> ? 2 * l + half : half * V::N + l);
    return typename V::Mask((V::keys(typename V::KeyLane(bits)) & places) == places);
  }
}

// The other way: the elements of a block whose lanes are chosen.
template <class S>
inline uint32_t elements_where(typename Vec<typename Compute<S>::type>::Mask first,
                               typename Vec<typename Compute<S>::type>::Mask second) {
  using C = typename Compute<S>::type;
  constexpr int N = Vec<C>::N;
  const uint32_t a = bits_of_lanes<C>(first), b = bits_of_lanes<C>(second);
  if constexpr (!kInterleaved<S>) return a | b << N;
#if defined(__BMI2__)
  return _pdep_u32(a, 0x55555555) | _pdep_u32(b, 0xAAAAAAAA);
#else
  uint32_t elements = 0;
  for (int l = 0; l < N; ++l) elements |= (a >> l & 1) << 2 * l | (b >> l & 1) << (2 * l + 1);
  return elements;
#endif
}

// Past the caches: the line is not read before it is written. `p` must be aligned to 64 bytes; fence() makes such
// stores visible to other threads before the kernel returns.
template <class S>
inline void stream_block(Block<typename Compute<S>::type> x, S* p) {
  alignas(64) S lines[Block<typename Compute<S>::type>::N];
  store_block(x, lines);
  stream_lines<sizeof lines>(lines, p);
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
