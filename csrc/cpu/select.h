// Order statistics of keys in memory: a radix descent, never a sort.
#pragma once
#include <cstdint>
#include <vector>

#include "trim_kernel.h"

namespace sk {

// The rank-th largest key, 1 <= rank <= keys.size(). Leaves `keys` in any state.
template <class Key>
Key kth_largest(std::vector<Key>& keys, int64_t rank);

constexpr int kRadixBits = 11;

// Keys [lo, hi] in 2^kRadixBits bins or fewer.
template <class Key>
struct Radix {
  Key lo, hi;
  int shift;

  Radix(Key lo, Key hi);
  int bins() const { return int((hi - lo) >> shift) + 1; }
  int bin(Key key) const { return int((key - lo) >> shift); }
  // The bin that holds the rank-th largest; `rank` becomes its rank within that bin.
  template <class Count>
  Radix<Key> descend(const Count* histogram, int64_t& rank) const {
    int b = bins() - 1;
    for (; b > 0 && rank > int64_t(histogram[b]); --b) rank -= int64_t(histogram[b]);
    const Key first = lo + (Key(b) << shift), width = (Key(1) << shift) - 1;
    return {first, hi - first < width ? hi : first + width};
  }
};

// A bracket that holds the rank-th largest of `population` keys with overwhelming probability, from samples drawn in
// clusters of neighbours: cluster c is sample[ends[c - 1], ends[c]). Neighbours may be alike (rows of one layer), so
// the spread is estimated between clusters.
template <class Key>
Bracket<Key> sampled_bracket(const std::vector<Key>& sample, const std::vector<int64_t>& ends, int64_t rank,
                             int64_t population);

}  // namespace sk
