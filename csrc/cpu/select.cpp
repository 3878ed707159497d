#include "select.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace sk {

template <class Key>
OrderStatistics<Key>::OrderStatistics(std::vector<Span<Key>> spans, Key lo, Key hi)
    : spans_(std::move(spans)), range_(lo, hi), histogram_(size_t(range_.bin(hi)) + 1) {
  for (const auto& span : spans_)
    for (int64_t i = 0; i < span.size; ++i) ++histogram_[range_.bin(span.data[i])];
}

template <class Key>
Key OrderStatistics<Key>::kth_largest(int64_t rank) const {
  const Radix<Key> bin = range_.descend(histogram_.data(), rank);
  if (bin.lo == bin.hi) return bin.lo;
  std::vector<Key> keys(size_t(histogram_[range_.bin(bin.lo)]) + 1);  // one past the end is written, never read
  size_t kept = 0;
  for (const auto& span : spans_)
    for (int64_t i = 0; i < span.size; ++i) {
      keys[kept] = span.data[i];
      kept += bin.holds(span.data[i]);
    }
  if (kept > 4096) return OrderStatistics({{keys.data(), int64_t(kept)}}, bin.lo, bin.hi).kth_largest(rank);
  std::nth_element(keys.begin(), keys.begin() + (rank - 1), keys.begin() + int64_t(kept), std::greater<Key>());
  return keys[size_t(rank) - 1];
}

template <class Key>
SampledRange<Key> sampled_range(const std::vector<Key>& sample, const std::vector<int64_t>& ends, int64_t rank,
                                int64_t population) {
  const int64_t size = int64_t(sample.size());
  const auto [smallest, largest] = std::minmax_element(sample.begin(), sample.end());
  const OrderStatistics<Key> order({{sample.data(), size}}, *smallest, *largest);
  const double fraction = double(rank) / double(population), expected = fraction * double(size);
  const int64_t centre = std::clamp<int64_t>(llround(expected), 1, size);
  const Key middle = order.kth_largest(centre);

  const double mean = expected / double(ends.size());
  double variance = 0;
  int64_t i = 0;
  for (const int64_t end : ends) {
    int count = 0;
    for (; i < end; ++i) count += sample[i] >= middle;
    variance += (count - mean) * (count - mean);
  }
  variance = std::max(variance, double(size) * fraction * (1 - fraction));
  const int64_t half_width = llround(4 * std::sqrt(variance)) + 8;  // a miss costs more reads, never exactness
  SampledRange<Key> range;
  range.lo = centre + half_width > size ? 0 : order.kth_largest(centre + half_width);
  range.hi = centre - half_width < 1 ? kInfinityKey<Key> : order.kth_largest(centre - half_width);
  const auto copies = [&](Key key) { return std::count(sample.begin(), sample.end(), key); };
  range.crowded_ends = copies(range.lo) > half_width || copies(range.hi) > half_width;
  return range;
}

#define SK_INSTANTIATE(Key)            \
  template class OrderStatistics<Key>; \
  template SampledRange<Key> sampled_range(const std::vector<Key>&, const std::vector<int64_t>&, int64_t, int64_t);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

}  // namespace sk
