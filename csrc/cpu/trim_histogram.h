// Exact thresholds where the bracket of a sample missed.
#pragma once
#include <cstdint>
#include <vector>

#include "scope.h"

namespace sk {

// The exact thresholds by histograms of ever fewer bits: three reads for float32, six for float64. Needs no luck and no
// candidates.
template <class Key>
std::vector<Key> histogram_thresholds(const Scope& scope, const std::vector<int64_t>& tasks, std::vector<int64_t> rank,
                                      bool drop);

}  // namespace sk
