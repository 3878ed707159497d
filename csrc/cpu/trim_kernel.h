// The passes behind trim_thresholds, over raw pointers. `base` may be null: then `expert` already is a task vector.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

// Ascending boundaries around the expected threshold. Keys in (lo, hi] are stored. Where one value alone fills
// (hi, top] or (bottom, lo], because its copies would swamp the stored keys, they are counted; else these are empty.
template <class Key>
struct Bracket {
  Key bottom, lo, hi, top;
};

template <class Key>
struct Counts {
  int64_t above, at_hi, inside, at_lo;  // keys > top, in (hi, top], in (lo, hi], in (bottom, lo]
  Key largest;

  Counts& operator+=(const Counts& other) {
    above += other.above;
    at_hi += other.at_hi;
    inside += other.inside;
    at_lo += other.at_lo;
    largest = largest > other.largest ? largest : other.largest;
    return *this;
  }
};

struct L1Norms {
  double all, kept;

  L1Norms& operator+=(const L1Norms& other) {
    all += other.all;
    kept += other.kept;
    return *this;
  }
};

template <class Key>
struct TrimKernel {
  // One read. Keys of the differences, rounded to the dtype or not; those in (lo, hi] go to `inside`, in any order,
  // which has room for n + kSlack keys.
  Counts<Key> (*count)(const void* base, const void* expert, int64_t n, Bracket<Key> bracket, bool rounded, bool drop,
                       Key* inside);
  // The same, and the index of every key that went to `inside`; `at` has room for as many.
  Counts<Key> (*locate)(const void* base, const void* expert, int64_t n, Bracket<Key> bracket, bool rounded, bool drop,
                        Key* inside, Key* at);
  // The rounded keys, in order.
  void (*keys)(const void* base, const void* expert, int64_t n, bool drop, Key* out);
  // Norms of the task vector and of its entries with key > limit; summed in one order on every ISA.
  L1Norms (*l1_norms)(const void* base, const void* expert, int64_t n, Key limit, bool drop);
};

constexpr int64_t kSlack = 16;  // keys that may be written past the end of an output

using TrimKernels = PerDtype<TrimKernel>;

SK_DECLARE_KERNELS(TrimKernels, trim_kernels);

}  // namespace sk
