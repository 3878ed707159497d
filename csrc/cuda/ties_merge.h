// Trim, elect, disjoint merge, scale, add to base and round: every tensor is read once after the thresholds are known,
// and no task vector is ever stored. Results are those of csrc/cpu/ties_merge_kernel.cpp, bit by bit.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "../ties_rule.h"
#include "scope.h"
#include "trim.h"

namespace sk {
namespace cuda {

struct MergeOptions {
  Rule rule;
  bool elect_count;  // elect by the number of signs, not by their mass
  bool divide;       // mean, not sum
  bool rescale;      // scale every trimmed task vector back to its L1 norm
  bool error, drop;  // what becomes of NaN and infinity; neither: they propagate
  bool split;        // out: each expert's entries that agree with the elected sign, [num_tasks, numel], of one tensor
  double lam;
  TrimOptions trim;
  std::vector<double> weights;   // [num_parts, num_tasks] in the compute type, or empty: all one
  std::vector<double> divisors;  // [num_parts] of Rule::mergekit_all, else empty
};

// Fills the outputs of the tensors. limits: [num_tasks] on the device, or null to find them here. The result is null,
// or, under `error`, where on the device it says 1 when nothing was written because of NaN or infinity.
template <class Key>
const int* ties_merge(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                      const MergeOptions& options, const Limit<Key>* limits);

}  // namespace cuda
}  // namespace sk
