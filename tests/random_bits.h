// The numbers of the kernel tests: the same on every machine.
#pragma once
#include <cstdint>

inline uint64_t random_bits() {  // xorshift64
  static uint64_t state = 0x9E3779B97F4A7C15;
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
