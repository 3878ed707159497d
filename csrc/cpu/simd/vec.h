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
