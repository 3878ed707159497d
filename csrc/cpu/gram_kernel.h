// Products of all pairs of vectors, added up in float64 over raw pointers: every expert is read once, and the pairs
// meet in the first-level cache. The order of the additions is part of the result and the same on every instruction
// set.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "block_sums.h"
#include "isa.h"

namespace sk {

constexpr int kGramSteps = 16;  // of all vectors, that lie between memory and the pairs

namespace {  // one for every instruction set

// Pairs (i, j) with i <= j in the order (0, 0), (0, 1), ..., (1, 1), ...
inline int64_t num_pairs(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }
inline int64_t pair_of(int64_t i, int64_t j, int64_t num_tasks) { return i * (2 * num_tasks - i - 1) / 2 + j; }

}  // namespace

template <class Key>
struct GramArgs {
  const void* base;            // may be null: then the vectors are the experts, else expert - base
  const void* const* experts;  // [num_tasks]
  int num_tasks;
  int64_t steps, stride;  // elements from one step to the next
  int width, last;        // elements of a step, and of the last one; more than kSumLanes are strips side by side
  bool rounded;           // to the stored dtype
  bool drop;              // a non-finite entry counts as 0
};

// Lane l of a pair in a strip is the sum, step after step, of the products there. vectors: scratch [num_tasks,
// kGramSteps, kSumLanes]; sums: [strips, num_pairs, kSumLanes].
template <class Key>
using GramKernel = void (*)(const GramArgs<Key>& args, double* vectors, double* sums);

struct GramKernels {
  PerDtype<GramKernel> add;
  // folded[p] = the sum of the lanes of sums[p], which are spoilt.
  void (*fold)(double* sums, int64_t num_pairs, double* folded);
};

SK_DECLARE_KERNELS(GramKernels, gram_kernels);

}  // namespace sk
