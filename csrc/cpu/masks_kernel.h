// Packed masks over raw pointers: bits drawn by the words of philox.h, and the sums of what they keep. `base` may be
// null: then `expert` already is a task vector. A sum reads base and expert once.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "../philox.h"
#include "isa.h"

namespace sk {

struct MaskSums {
  int64_t kept;           // bits
  double all, kept_norm;  // L1 norms of the task vector, and of its entries whose bit is set
};

// Of n <= kSumBlock elements, in the order of block_sums.h; the task vector is rounded to its dtype.
template <class Key>
using MaskSumsKernel = MaskSums (*)(const void* base, const void* expert, int64_t n, bool drop, const uint8_t* bits);

struct MasksKernels {
  // bits_below and words_of of random_bits.h
  void (*bits)(const RandomStream& stream, uint64_t limit, int64_t first, int64_t n, uint8_t* bits);
  void (*words)(const RandomStream& stream, int64_t first, int64_t n, uint32_t* words);
  PerDtype<MaskSumsKernel> sums;
};

constexpr int64_t kWordSlack = 32;  // words that may be written past the end of an output

SK_DECLARE_KERNELS(MasksKernels, masks_kernels);

}  // namespace sk
