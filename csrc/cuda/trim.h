// Exact per-expert thresholds over a scope. A sample of each expert brackets its threshold; one read of everything
// counts what lies above the bracket and collects what lies inside; a radix descent picks the threshold among that. A
// bracket that misses, or holds too much, costs a radix descent over the tensors themselves. Nothing waits for the
// host: kernels that are not needed end at once.
#pragma once
#include <cstdint>
#include <vector>

#include "scope.h"

namespace sk {
namespace cuda {

// An entry is kept when its key is above the threshold, or equals it and lies before `cut` in the scope's flat order.
template <class Key>
struct Limit {
  Key threshold;
  int64_t cut;
};

struct TrimOptions {
  std::vector<int64_t> keep;  // [num_tasks] entries that stay; at least numel: all of them
  bool all_ties;              // else so many that exactly `keep` stay
  bool drop;                  // a non-finite entry counts as 0
};

// The limits [num_tasks] on the device. nonfinite, unless null, becomes 1 when a task vector holds NaN or infinity.
template <class Key>
const Limit<Key>* trim(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                       const TrimOptions& options, int* nonfinite);

// nonfinite becomes 1 when a task vector holds NaN or infinity.
void look_for_nonfinite(const Device& device, const ScopeBuilder& tensors, const Scope& scope, int* nonfinite);

// Non-finite values [num_parts, 1 + 2 num_tasks] on the device: of the base, of every expert, of every task vector.
const unsigned long long* count_nonfinite(const Device& device, const Scope& scope);

// Their parts, each [num_tasks].
template <class Key>
void take_apart(const Device& device, const Limit<Key>* limits, int num_tasks, Key* thresholds, int64_t* cuts);

// Tests only: every bracket misses.
void force_descent(bool on);

}  // namespace cuda
}  // namespace sk
