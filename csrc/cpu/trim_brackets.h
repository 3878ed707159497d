// Where the thresholds of a scope are expected, from a sample of its keys.
#pragma once
#include <cstdint>
#include <vector>

#include "scope.h"
#include "trim_kernel.h"

namespace sk {

// All keys from value `lo` to value `hi`, their copies stored or counted.
template <class Key>
Bracket<Key> bracket_of(const Scope& scope, Key lo, Key hi, bool counts_ends);

// For every expert of `tasks`, a bracket that holds its rank-th largest key with overwhelming probability.
template <class Key>
std::vector<Bracket<Key>> brackets(const Scope& scope, const std::vector<int64_t>& tasks,
                                   const std::vector<int64_t>& rank, bool drop);

}  // namespace sk
