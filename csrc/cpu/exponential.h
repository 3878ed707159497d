// exp and log by additions, multiplications and divisions alone: the same bits on every instruction set.
// Kernel files only.
#pragma once
#include <cstdint>
#include <cstring>

namespace sk {
namespace SK_ISA {
namespace {

constexpr double kLn2High = 6.93147180369123816490e-01;  // its last 21 bits are 0: times an exponent it is exact
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kToInteger = 0x1.8p52;  // added to a small number it leaves the nearest integer in the low bits
constexpr uint64_t kOneBits = 0x3FF0000000000000, kToIntegerBits = 0x4338000000000000;

inline uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double from_bits_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float from_bits_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// 2^n e^r with |r| <= ln(2) / 2. Two factors of 2^(n/2): the result may be subnormal or too large.
inline double exponential(double x) {
  double y = x > 710.0 ? 710.0 : x;
  y = y < -746.0 ? -746.0 : y;
  const double shifted = y * 1.44269504088896338700 + kToInteger;
  const double n = shifted - kToInteger;
  const double r = (y - n * kLn2High) - n * kLn2Low;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 1.0 / 2.0;
  p = 1.0 + (r + r * r * p);
  const double halved = n * 0.5 + kToInteger;  // half of n, to an integer
  const uint64_t half = bits_of(halved) - kToIntegerBits, other = bits_of(shifted) - kToIntegerBits - half;
  const double scaled = p * from_bits_of(kOneBits + (half << 52)) * from_bits_of(kOneBits + (other << 52));
  return x == x ? scaled : x;
}

// The same of float, to its precision.
inline float exponential_f32(float x) {
  constexpr float kShift = 0x1.8p23f;
  constexpr uint32_t kOne = 0x3F800000, kShiftBits = 0x4B400000;
  float y = x > 89.0f ? 89.0f : x;
  y = y < -104.0f ? -104.0f : y;
  const float shifted = y * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (y - n * 0.693145752f) - n * 1.42860677e-6f;  // the last 9 bits of the first are 0
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 1.0f / 2.0f;
  p = 1.0f + (r + r * r * p);
  const float halved = n * 0.5f + kShift;
  const uint32_t half = bits_of(halved) - kShiftBits, other = bits_of(shifted) - kShiftBits - half;
  const float scaled = p * from_bits_of(kOne + (half << 23)) * from_bits_of(kOne + (other << 23));
  return x == x ? scaled : x;
}

// x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): log(1 + f) = 2 atanh(s), s = f / (2 + f).
inline double logarithm(double x) {
  constexpr uint64_t kSqrtHalfBits = 0x3FE6A09E667F3BCD;
  const bool small = x < 0x1p-1022;
  const uint64_t u = bits_of(small ? x * 0x1p54 : x) + (kOneBits - kSqrtHalfBits);
  const double k = from_bits_of((u >> 52) + kToIntegerBits) - kToInteger - 1023.0 - (small ? 54.0 : 0.0);
  const double f = from_bits_of((u & 0x000FFFFFFFFFFFFF) + kSqrtHalfBits) - 1.0;
  const double s = f / (2.0 + f), z = s * s;
  double p = 2.0 / 23.0;
  p = p * z + 2.0 / 21.0;
  p = p * z + 2.0 / 19.0;
  p = p * z + 2.0 / 17.0;
  p = p * z + 2.0 / 15.0;
  p = p * z + 2.0 / 13.0;
  p = p * z + 2.0 / 11.0;
  p = p * z + 2.0 / 9.0;
  p = p * z + 2.0 / 7.0;
  p = p * z + 2.0 / 5.0;
  p = p * z + 2.0 / 3.0;
  const double square = 0.5 * f * f;
  const double y = k * kLn2High - ((square - (s * (square + z * p) + k * kLn2Low)) - f);
  const double infinity = __builtin_inf(), nan = __builtin_nan("");
  const double special = x == 0.0 ? -infinity : x < 0.0 ? nan : x;  // infinity and NaN stay
  return x > 0.0 && x < infinity ? y : special;
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
