// What task vectors do, counted and summed over raw pointers: one read of the base and of every expert. Signs become
// one bit of an element for each expert, so that pairs of experts meet in words of 64 elements.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "block_sums.h"
#include "isa.h"

namespace sk {

constexpr int kWord = 64;  // elements

namespace {  // one for every instruction set

// Where the counts of a tensor lie; of models the base comes first.
struct CensusCounts {
  int64_t n;  // experts

  int64_t nonfinite() const { return 0; }                  // [n + 1]
  int64_t zeros() const { return nonfinite() + n + 1; }    // [n + 1]
  int64_t saturated() const { return zeros() + n + 1; }    // [n + 1], equal to the largest number or its negative
  int64_t changed() const { return saturated() + n + 1; }  // [n]
  int64_t kept() const { return changed() + n; }           // [n]
  int64_t touched() const { return kept() + n; }           // by any expert
  int64_t conflicts() const { return touched() + 1; }      // in both directions
  int64_t kept_by_any() const { return conflicts() + 1; }  // entries that an expert keeps
  int64_t kept_by_two() const { return kept_by_any() + 1; }
  int64_t kept_conflicts() const { return kept_by_two() + 1; }
  int64_t both() const { return kept_conflicts() + 1; }  // [n, n], changed by both, each pair once
  int64_t against() const { return both() + n * n; }     // [n, n], of these in two directions
  int64_t size() const { return against() + n * n; }
};

// Where the sums lie: of magnitudes of each expert's changes, of the lesser direction, of squares of the base.
struct CensusSums {
  int64_t n;

  int64_t mass() const { return 0; }  // [n]
  int64_t lesser() const { return n; }
  int64_t base_square() const { return n + 1; }
  int64_t size() const { return n + 2; }
};

}  // namespace

template <class Key>
struct CensusArgs {
  const void* base;
  const void* const* experts;  // [num_tasks]
  int num_tasks;
  int64_t count;
  const Key* thresholds;  // [num_tasks], keys from which an entry is kept; null: none is
};

// Adds to counts and, lane by lane, to sums [CensusSums::size, kSumLanes]. words: scratch [2 * num_tasks].
template <class Key>
using CensusKernel = void (*)(const CensusArgs<Key>& args, uint64_t* words, int64_t* counts, double* sums);

struct CensusKernels {
  PerDtype<CensusKernel> add;
};

SK_DECLARE_KERNELS(CensusKernels, census_kernels);

}  // namespace sk
