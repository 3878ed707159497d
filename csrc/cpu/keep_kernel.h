// Masks by magnitude, over raw pointers: clears the bits of entries on the wrong side of a limit. `base` may be null:
// then `expert` already is a task vector. Reads base and expert once.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

// Which keys are above: element i compares with `before` where i < cut, and with `after` from there on.
template <class Key>
struct Bound {
  Key before, after;
  int64_t cut;
};

template <class Key>
struct KeepKernel {
  // Bits of n entries, least significant first; keys are those of task vectors as their dtype stores them.
  void (*keep_above)(const void* base, const void* expert, int64_t n, Bound<Key> bound, bool drop, uint8_t* bits);
  // NaN, which has to reach the output, keeps its bit.
  void (*drop_above)(const void* base, const void* expert, int64_t n, Bound<Key> bound, bool drop, uint8_t* bits);
};

using KeepKernels = PerDtype<KeepKernel>;

SK_DECLARE_KERNELS(KeepKernels, keep_kernels);

}  // namespace sk
