// The passes behind trim_thresholds, over raw pointers. `base` may be null: then `expert` already is a task vector.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

// The threshold lies in [lo, hi], or the pass that counts finds out that it does not.
template <class Key>
struct Bracket {
  Key lo, hi;
};

template <class Key>
struct Counts {
  int64_t above, at_hi, inside, at_lo;  // keys > hi, == hi, strictly between, == lo (0 where lo == hi)
  Key largest;
};

struct L1Norms {
  double all, kept;
};

template <class Key>
struct TrimKernel {
  // One read. Keys strictly inside the bracket go to `inside`, in order; it holds n + kSlack keys.
  Counts<Key> (*count)(const void* base, const void* expert, int64_t n, Bracket<Key> bracket, bool drop, Key* inside);
  void (*keys)(const void* base, const void* expert, int64_t n, bool drop, Key* out);
  // Norms of the task vector and of its entries with key > limit; summed in one order on every ISA.
  L1Norms (*l1_norms)(const void* base, const void* expert, int64_t n, Key limit, bool drop);
};

constexpr int64_t kSlack = 16;  // keys that `count` and `keys` may write past the end of their output

struct TrimKernels {
  TrimKernel<int32_t> f32, f16, bf16;
  TrimKernel<int64_t> f64;

  template <class Key>
  const TrimKernel<Key>& get(Dtype dtype) const {
    if constexpr (sizeof(Key) == 8) {
      return f64;
    } else {
      return dtype == Dtype::f32 ? f32 : dtype == Dtype::f16 ? f16 : bf16;
    }
  }
};

SK_DECLARE_KERNELS(TrimKernels, trim_kernels);

}  // namespace sk
