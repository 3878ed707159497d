// A merge whose blocks are parted at random into groups with coefficients of their own, over raw pointers and one piece
// of a block. The group of an element follows from a word of philox.h: no mask is stored or read. Reads each task
// vector once.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "../philox.h"
#include "isa.h"

namespace sk {

constexpr int64_t kMostGroups = 256;

template <class Key>
struct GroupsArgs {
  using C = ComputeOf<Key>;

  const void* base;                 // backward: the gradient of the result
  const void* const* task_vectors;  // [num_tasks]
  const C* coefficients;            // [num_tasks, num_groups]
  int num_tasks, num_groups;
  // Element i of a block is of the group (word * num_groups) >> 32, by the word of element i of the stream.
  RandomStream stream;
  int64_t first;  // of the elements, within the block: a multiple of 4
  int64_t n;
};

// out = base + sum_t coefficients[t, group] * task_vectors[t]
template <class Key>
using GroupsKernel = void (*)(const GroupsArgs<Key>& args, void* out);

// sums = <gradient, task_vectors[t]> over every group.  # [num_tasks, num_groups]
template <class Key>
using GroupsGradients = void (*)(const GroupsArgs<Key>& args, double* sums);

struct CombineGroupsKernels {
  PerDtype<GroupsKernel> forward;
  PerDtype<GroupsGradients> backward;
};

SK_DECLARE_KERNELS(CombineGroupsKernels, combine_groups_kernels);

}  // namespace sk
