// The words of philox.h, several blocks at a time, for kernel files only (one object per ISA).
#pragma once
#include <cstdint>
#include <cstring>

#include "../philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sk {
namespace SK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWideBytes = 64;
#elif defined(__AVX2__)
constexpr int kWideBytes = 32;
#else
constexpr int kWideBytes = 16;
#endif

// A block per lane: 32-bit values in 64-bit lanes, as the multiplication takes them. It ignores the upper halves, so
// they hold whatever is left there.
typedef uint64_t Wide __attribute__((vector_size(kWideBytes)));
constexpr int kBlocks = kWideBytes / 8;
constexpr int kWords = 4 * kBlocks;  // of one step

inline Wide multiply_low(Wide a, uint64_t factor) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(int64_t(factor)));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(int64_t(factor)));
#elif defined(__x86_64__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(int64_t(factor)));
#elif defined(__aarch64__)
  return (Wide)vmull_n_u32(vmovn_u64((uint64x2_t)a), uint32_t(factor));
#else
  return (a & 0xFFFFFFFF) * factor;
#endif
}

struct Words {
  Wide v[4];  // word j of block i in the lower half of lane i of v[j]
};

inline Words random_words(const RandomStream& stream, Wide block) {
  uint32_t key[2] = {uint32_t(stream.seed), uint32_t(stream.seed >> 32)};
  Words c = {{block, block >> 32, Wide{} + stream.tensor_id, Wide{} + stream.task_id}};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Wide first = multiply_low(c.v[0], kPhiloxMultipliers[0]),
               second = multiply_low(c.v[2], kPhiloxMultipliers[1]);
    c = {{(second >> 32) ^ c.v[1] ^ key[0], second, (first >> 32) ^ c.v[3] ^ key[1], first}};
    for (int i = 0; i < 2; ++i) key[i] += kPhiloxKeySteps[i];
  }
  return c;
}

inline Wide blocks_from(int64_t first) {
  Wide block = Wide{} + uint64_t(first) / 4;
  for (int i = 0; i < kBlocks; ++i) block[i] += uint64_t(i);
  return block;
}

// Bit i: whether the word of element first + i is below `limit` (at most 2^32). first: a multiple of 8; bits: n, least
// significant first, and 0 after them to the end of their byte.
inline void bits_below(const RandomStream& stream, uint64_t limit, int64_t first, int64_t n, uint8_t* bits) {
  if (limit >> 32) {  // all of them, whatever the words
    memset(bits, 0xFF, size_t(n + 7) / 8);
    if (n % 8) bits[n / 8] = uint8_t((1 << n % 8) - 1);
    return;
  }
  Wide block = blocks_from(first);
  for (int64_t i = 0; i < n; i += kWords) {
    const Words words = random_words(stream, block);
    block += uint64_t(kBlocks);
    Wide four = {};  // bits of a block, from what the subtraction borrows
    for (int j = 0; j < 4; ++j) four |= ((words.v[j] & 0xFFFFFFFF) - limit) >> 63 << j;
    uint32_t step = 0;
    for (int b = 0; b < kBlocks; ++b) step |= uint32_t(four[b]) << 4 * b;
    const int64_t left = n - i;
    if (left < kWords) step &= (uint32_t(1) << left) - 1;
    memcpy(bits + i / 8, &step, size_t(left < kWords ? (left + 7) / 8 : kWords / 8));
  }
}

// The words of elements first to first + n - 1. first: a multiple of 4; words: room for n + kWords.
inline void words_of(const RandomStream& stream, int64_t first, int64_t n, uint32_t* words) {
  Wide block = blocks_from(first);
  for (int64_t i = 0; i < n; i += kWords) {
    const Words step = random_words(stream, block);
    block += uint64_t(kBlocks);
    const Wide first_two = (step.v[0] & 0xFFFFFFFF) | step.v[1] << 32;
    const Wide last_two = (step.v[2] & 0xFFFFFFFF) | step.v[3] << 32;
    uint64_t of_blocks[2 * kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      of_blocks[2 * b] = first_two[b];
      of_blocks[2 * b + 1] = last_two[b];
    }
    memcpy(words + i, of_blocks, sizeof of_blocks);
  }
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
