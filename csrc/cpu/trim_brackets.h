// Where the thresholds of a scope are expected, from a sample of its keys.
#pragma once
#include <cstdint>
#include <vector>

#include "scope.h"
#include "trim_kernel.h"
#include "trim_tally.h"

namespace sk {

// All keys from value `lo` to value `hi`, their copies stored or counted.
template <class Key>
Bracket<Key> bracket_of(const Scope& scope, Key lo, Key hi, bool counts_ends);

// Where a sample expects the rank-th largest keys of some experts.
template <class Key>
struct Expected {
  std::vector<Bracket<Key>> brackets;  // each holds its key with overwhelming probability
  std::vector<Key> middles;            // as they are stored; what is most likely
  std::vector<int64_t> cuts;           // among the ties of those, likewise
};

// For every expert of `tasks`, from a sample. Wanted::places: a merge goes by the middles, so the sample is larger, and
// more copies of one value have places.
template <class Key>
Expected<Key> expected(const Scope& scope, const std::vector<int64_t>& tasks, const std::vector<int64_t>& rank,
                       bool drop, Wanted wanted = Wanted::ties);

}  // namespace sk
