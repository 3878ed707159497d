// Order statistics of keys in memory: a radix descent, never a sort.
#pragma once
#include <cstdint>
#include <vector>

#include "../dtype.h"

namespace sk {

constexpr int kRadixBits = 11;

// Keys [lo, hi] in 2^kRadixBits bins or fewer.
template <class Key>
struct Radix {
  Key lo, hi;
  int shift = 0;

  Radix(Key lo, Key hi) : lo(lo), hi(hi) {
    while ((hi - lo) >> shift >> kRadixBits) ++shift;
  }
  bool holds(Key key) const { return key >= lo && key <= hi; }
  int bin(Key key) const { return int((key - lo) >> shift); }
  // The bin that holds the rank-th largest; `rank` becomes its rank within that bin.
  template <class Count>
  Radix descend(const Count* histogram, int64_t& rank) const {
    int b = bin(hi);
    for (; b > 0 && rank > int64_t(histogram[b]); --b) rank -= int64_t(histogram[b]);
    const Key first = lo + (Key(b) << shift), width = (Key(1) << shift) - 1;
    return {first, hi - first < width ? hi : first + width};
  }
};

template <class Key>
struct Span {
  const Key* data;
  int64_t size;
};

// Order statistics of the keys of some spans, all in [lo, hi]. One histogram serves every question.
template <class Key>
class OrderStatistics {
 public:
  OrderStatistics(std::vector<Span<Key>> spans, Key lo, Key hi);
  Key kth_largest(int64_t rank) const;  // 1 <= rank <= number of keys

  // Collects all keys from the `first`-th largest to the `last`-th, and others near them; returns how many are above.
  int64_t collect(int64_t first, int64_t last, std::vector<Key>& keys) const;

 private:
  std::vector<Span<Key>> spans_;
  Radix<Key> range_;
  std::vector<int64_t> histogram_;
};

// A range that holds the rank-th largest of `population` keys with overwhelming probability, most likely near `middle`.
template <class Key>
struct SampledRange {
  Key lo, middle, hi;
  bool crowded_ends;  // many keys equal lo or hi
  double kept_ties;   // the share of those that equal `middle` that make up the rank
};

// From samples drawn in clusters of neighbours: cluster c is sample[ends[c - 1], ends[c]). Neighbours may be alike
// (rows of one layer), so the spread is estimated between clusters. most_copies: in the sample, of an end, that are not
// many yet.
template <class Key>
SampledRange<Key> sampled_range(const std::vector<Key>& sample, const std::vector<int64_t>& ends, int64_t rank,
                                int64_t population, int64_t most_copies);

}  // namespace sk
