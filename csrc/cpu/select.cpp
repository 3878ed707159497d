#include "select.h"

#include <algorithm>
#include <cmath>

namespace sk {

template <class Key>
Radix<Key>::Radix(Key lo, Key hi) : lo(lo), hi(hi), shift(0) {
  while ((hi - lo) >> shift >> kRadixBits) ++shift;
}

template <class Key>
Key kth_largest(std::vector<Key>& keys, int64_t rank) {
  const auto [smallest, largest] = std::minmax_element(keys.begin(), keys.end());
  Radix<Key> range(*smallest, *largest);
  while (range.lo != range.hi) {
    if (keys.size() <= 256) {
      std::nth_element(keys.begin(), keys.begin() + (rank - 1), keys.end(), std::greater<Key>());
      return keys[rank - 1];
    }
    uint32_t histogram[1 << kRadixBits] = {};
    for (const Key key : keys) ++histogram[range.bin(key)];
    range = range.descend(histogram, rank);
    size_t kept = 0;
    for (const Key key : keys) {
      keys[kept] = key;
      kept += key >= range.lo && key <= range.hi;
    }
    keys.resize(kept);
  }
  return range.lo;
}

template <class Key>
Bracket<Key> sampled_bracket(const std::vector<Key>& sample, const std::vector<int64_t>& ends, int64_t rank,
                             int64_t population) {
  const int64_t size = int64_t(sample.size());
  const double fraction = double(rank) / double(population), expected = fraction * double(size);
  std::vector<Key> scratch = sample;
  const Key middle = kth_largest(scratch, std::clamp<int64_t>(llround(expected), 1, size));

  const double mean = expected / double(ends.size());
  double variance = 0;
  int64_t i = 0;
  for (const int64_t end : ends) {
    int64_t count = 0;
    for (; i < end; ++i) count += sample[i] >= middle;
    variance += (double(count) - mean) * (double(count) - mean);
  }
  variance = std::max(variance, double(size) * fraction * (1 - fraction));
  const int64_t half_width = llround(5 * std::sqrt(variance)) + 8, centre = llround(expected);

  const auto at_rank = [&](int64_t r, Key beyond) {
    if (r < 1 || r > size) return beyond;
    scratch = sample;
    return kth_largest(scratch, r);
  };
  return {at_rank(centre + half_width, 0), at_rank(centre - half_width, kMaxKey<Key>)};
}

#define SK_INSTANTIATE(Key)                          \
  template struct Radix<Key>;                        \
  template Key kth_largest(std::vector<Key>&, int64_t); \
  template Bracket<Key> sampled_bracket(const std::vector<Key>&, const std::vector<int64_t>&, int64_t, int64_t);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

}  // namespace sk
