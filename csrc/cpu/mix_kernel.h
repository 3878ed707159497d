// Linear combinations over raw pointers: one read of base and experts for all outputs, one rounding each.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

template <class Key>
struct MixArgs {
  using C = ComputeOf<Key>;

  const void* base;            // may be null: then nothing is subtracted and nothing is added
  const void* const* experts;  // [num_tasks]
  // One for all n elements: [num_outputs, num_tasks] and [num_outputs]. By column: one for each of them at
  // table[(output * num_tasks + task) * stride + i] and table[output * stride + i].
  const C* coefficients;
  const C* base_coefficients;  // may be null: base is added as it is
  int64_t stride;
  int num_outputs, num_tasks;
  int64_t n;
  C divisor;
  bool subtract;  // base from the experts
  bool fused;     // a product and its addition are rounded once, on every instruction set
  bool drop;      // a non-finite entry counts as 0
  bool look;      // for what is not finite among what is summed and, where the sum is not of task vectors, in the base
  bool stream;    // write past the caches; not by column
};

// out: [num_outputs], n elements each. One may be an input: an element is written once everything of it is read.
// Whether `look` found anything: a task vector that the dtype could not store is not finite either.
template <class Key>
using MixKernel = bool (*)(const MixArgs<Key>& args, void* const* out);

struct MixKernels {
  PerDtype<MixKernel> uniform, by_column;
};

SK_DECLARE_KERNELS(MixKernels, mix_kernels);

}  // namespace sk
