// base + lam * (sum_t weight_t * (expert_t - base)) / divisor over raw pointers: one read, one rounding. With task
// vectors for experts base is not subtracted.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

template <class Key>
struct LinearArgs {
  using C = ComputeOf<Key>;

  const void* base;            // may be null: then nothing is subtracted and nothing is added
  const void* const* experts;  // [num_tasks]
  const C* weights;            // [num_tasks]
  int num_tasks;
  int64_t n;
  C lam, divisor;
  bool task_vectors;  // base is added only
  bool drop;          // a non-finite entry counts as 0
  bool stream;        // write past the caches
};

template <class Key>
using LinearKernel = void (*)(const LinearArgs<Key>& args, void* out);  // out: n elements

using LinearKernels = PerDtype<LinearKernel>;

SK_DECLARE_KERNELS(LinearKernels, linear_kernels);

}  // namespace sk
