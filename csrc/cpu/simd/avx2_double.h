// double on AVX2 and AVX-512: compiler vectors of 256 bits.
#pragma once
#include <immintrin.h>

#include "generic.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr bool kConvertsHalf = true;  // in few instructions
constexpr bool kFuses = true;         // multiply_add rounds once

template <>
inline Vec<double> multiply_add<double>(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {(Vec<double>::Lanes)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
}
template <>
inline Vec<double> square_root<double>(Vec<double> a) {
  return {(Vec<double>::Lanes)_mm256_sqrt_pd((__m256d)a.v)};
}
template <>
inline bool any<double>(Vec<double>::Mask m) {
  return !_mm256_testz_si256((__m256i)m, (__m256i)m);
}
template <>
inline uint32_t bits_of_lanes<double>(Vec<double>::Mask m) {
  return uint32_t(_mm256_movemask_pd((__m256d)m));
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
