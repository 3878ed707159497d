// NEON, which every 64-bit ARM has: compiler vectors of 128 bits.
#pragma once
#include <arm_neon.h>

#include "words.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr bool kConvertsHalf = true;  // in few instructions
constexpr bool kFuses = true;         // multiply_add rounds once

template <>
inline Vec<float> multiply_add<float>(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {(Vec<float>::Lanes)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
}
template <>
inline Vec<double> multiply_add<double>(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {(Vec<double>::Lanes)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
}

inline Vec<float> load(const Half* p) {
  return {(Vec<float>::Lanes)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
}
inline void store(Vec<float> x, Half* p) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.v))); }
inline Shorts magnitudes(Block<float> x, Half) {
  const auto stored = [&](int h) { return vreinterpret_s16_f16(vcvt_f16_f32((float32x4_t)x.v[h].v)); };
  return {(Shorts::Lanes)vcombine_s16(stored(0), stored(1)) & 0x7FFF};
}
inline Vec<float> round_to(Vec<float> x, Half) {
  return {(Vec<float>::Lanes)vcvt_f32_f16(vcvt_f16_f32((float32x4_t)x.v))};
}

template <size_t bytes>
inline void stream_lines(const void* lines, void* p) {
  memcpy(p, lines, bytes);
}
inline void fence() {}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
