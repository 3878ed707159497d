// Compiler vectors of 32-bit words, and bfloat16 as the upper half of each: where float is a compiler vector.
#pragma once
#include "generic.h"

namespace sk {
namespace SK_ISA {
namespace {

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
  // Round to nearest even. Every NaN that reaches here has a low half of 0 (see avx512.h): nothing carries.
  const Word u = (Word)x.v;
  return u + 0x7FFF + ((u >> 16) & 1);
}
inline void store(Vec<float> x, BFloat16* p) { narrow(bf16_bits(x) >> 16, p); }
inline Vec<float> round_to(Vec<float> x, BFloat16) { return from_bits(bf16_bits(x) & 0xFFFF0000); }

inline Block<float> load_block(const BFloat16* p) {
  Word both;
  memcpy(&both, p, sizeof both);
  return {{from_bits(both << 16), from_bits(both & 0xFFFF0000)}};
}
inline void store_block(Block<float> x, BFloat16* p) {
  const Word both = (bf16_bits(x.v[0]) >> 16) | (bf16_bits(x.v[1]) & 0xFFFF0000);
  memcpy(p, &both, sizeof both);
}

// The magnitudes of a block in a dtype of 16 bits, as integers; in any order.
struct Shorts {
  typedef int16_t Lanes __attribute__((vector_size(kVectorBytes<float>)));
  static constexpr int N = Block<float>::N;

  Lanes v;

  static Shorts set(int16_t x) { return {Lanes{} + x}; }
};
inline Shorts larger(Shorts a, Shorts b) { return {a.v > b.v ? a.v : b.v}; }
inline Shorts tally_above(Shorts acc, Shorts a, Shorts bound) { return {acc.v - (a.v > bound.v)}; }
// Of numbers that bfloat16 holds.
inline Shorts magnitudes(Block<float> x, BFloat16) {
  const Word both = ((Word)x.v[0].v >> 16) | ((Word)x.v[1].v & 0xFFFF0000);
  return {(Shorts::Lanes)both & 0x7FFF};
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
