// Exact per-expert thresholds over a scope, in one read of its tensors.
#pragma once
#include <string>
#include <vector>

#include "../trim_options.h"
#include "scope.h"

namespace sk {

// An entry is kept when its key is above the threshold, or equals it and lies before `cut` in the scope's flat order.
template <class Key>
struct Limit {
  Key threshold;
  int64_t cut;
};

// One limit to find: the rank-th largest key of an expert. Rank 0 keeps nothing; one above the number of entries keeps
// all of them, and neither is looked for.
struct Place {
  int64_t task, rank;
  bool from_smallest = false;  // the cut ends the ties of the smallest entries
};

// all_ties: without a cut among the ties.
template <class Key>
std::vector<Limit<Key>> limits_at(const Scope& scope, const std::vector<Place>& places, bool all_ties,
                                  NonFinite nonfinite, const std::vector<std::string>& names);

// density[t]: the share of its entries that expert t keeps. Without a cut among the ties it is the scope's numel.
template <class Key>
std::vector<Limit<Key>> trim(const Scope& scope, const std::vector<double>& density, Semantics semantics,
                             NonFinite nonfinite, const std::vector<std::string>& names);

// Test only: every bracket misses, so the radix histogram decides.
void force_histogram(bool on);

}  // namespace sk
