// Philox4x32-10 (Salmon et al., 2011): random words that depend on their place alone, whoever asks and in which order.
// This is the definition; kernels compute the same words many at a time (cpu/random_bits.h).
#pragma once
#include <array>
#include <cstdint>

namespace sk {

// Elements of one tensor of one expert take the words of one stream: element i takes word i % 4 of block i / 4.
struct RandomStream {
  uint64_t seed;
  uint32_t tensor_id, task_id;
};

namespace {  // kernel files include this too: no symbol of one instruction set may reach another

constexpr uint64_t kPhiloxMultipliers[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t kPhiloxKeySteps[2] = {0x9E3779B9, 0xBB67AE85};
constexpr int kPhiloxRounds = 10;

inline std::array<uint32_t, 4> philox_block(const RandomStream& stream, uint64_t block) {
  uint32_t key[2] = {uint32_t(stream.seed), uint32_t(stream.seed >> 32)};
  std::array<uint32_t, 4> c = {uint32_t(block), uint32_t(block >> 32), stream.tensor_id, stream.task_id};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = kPhiloxMultipliers[0] * c[0], second = kPhiloxMultipliers[1] * c[2];
    c = {uint32_t(second >> 32) ^ c[1] ^ key[0], uint32_t(second), uint32_t(first >> 32) ^ c[3] ^ key[1],
         uint32_t(first)};
    for (int i = 0; i < 2; ++i) key[i] += kPhiloxKeySteps[i];
  }
  return c;
}

// An entry is kept where its word is below this: with probability `density`, to 2^-32.
inline uint64_t keep_below(double density) {
  return density >= 1 ? uint64_t(1) << 32 : density > 0 ? uint64_t(density * 0x1p32) : 0;
}

}  // namespace
}  // namespace sk
