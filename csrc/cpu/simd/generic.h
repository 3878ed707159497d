// Compiler vectors: SSE2, AVX2 and NEON for float, every ISA for double. A mask is an integer vector of 0 and -1.
// Where an ISA has an instruction that the compiler does not find, its file has a specialisation.
#pragma once
#include <cstdint>
#include <cstring>

#include "../../dtype.h"

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
// a > b, or one of them is NaN.
template <class C>
inline typename Vec<C>::Mask not_at_most(Vec<C> a, Vec<C> b) {
  return ~typename Vec<C>::Mask(a.v <= b.v);
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
inline typename Vec<C>::Key select_key(typename Vec<C>::Mask m, typename Vec<C>::Key a, typename Vec<C>::Key b) {
  return m ? a : b;
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
  return a * b + c;
}
template <class C>
inline Vec<C> square_root(Vec<C> a) {
  for (int i = 0; i < Vec<C>::N; ++i) a.v[i] = sizeof(C) == 8 ? __builtin_sqrt(a.v[i]) : __builtin_sqrtf(float(a.v[i]));
  return a;
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
inline typename Vec<C>::Key add_keys(typename Vec<C>::Key a, typename Vec<C>::Key b) {
  return a + b;
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
  typename Vec<C>::KeyLane found = 0;
  for (int i = 0; i < Vec<C>::N; ++i) found |= m[i];
  return found != 0;
}
// Bit i: whether lane i is chosen.
template <class C>
inline uint32_t bits_of_lanes(typename Vec<C>::Mask m) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<C>::N; ++i) bits |= uint32_t(m[i] & 1) << i;
  return bits;
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

// Two vectors, the unit of every kernel loop.
template <class C>
struct Block {
  static constexpr int N = 2 * Vec<C>::N;
  Vec<C> v[2];
};

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
