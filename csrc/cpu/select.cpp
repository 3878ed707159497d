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
int64_t OrderStatistics<Key>::collect(int64_t first, int64_t last, std::vector<Key>& keys) const {
  int64_t above = first, past = last;  // ranks within the two bins
  const Radix<Key> top = range_.descend(histogram_.data(), above), bottom = range_.descend(histogram_.data(), past);
  int64_t size = 0;
  for (int b = range_.bin(bottom.lo); b <= range_.bin(top.lo); ++b) size += histogram_[size_t(b)];
  keys.resize(size_t(size) + 1);  // one past the end is written
  size_t kept = 0;
  for (const auto& span : spans_)
    for (int64_t i = 0; i < span.size; ++i) {
      keys[kept] = span.data[i];
      kept += span.data[i] >= bottom.lo && span.data[i] <= top.hi;
    }
  keys.resize(kept);
  return first - above;
}

// Order statistics of a sample that are asked for within a few ranks of one another: most passes go through their
// neighbourhood alone.
template <class Key>
class Neighbourhood {
 public:
  explicit Neighbourhood(const std::vector<Key>& sample)
      : size_(int64_t(sample.size())), all_({{sample.data(), size_}}, 0, kMaxKey<Key>) {}

  void move_to(int64_t first, int64_t last) {
    first = std::clamp<int64_t>(first, 1, size_), last = std::clamp<int64_t>(last, 1, size_);
    if (first > above_ && last <= above_ + int64_t(near_.size())) return;
    above_ = all_.collect(first, last, near_);
  }
  Key kth_largest(int64_t rank) const {
    const auto [smallest, largest] = std::minmax_element(near_.begin(), near_.end());
    return OrderStatistics<Key>({{near_.data(), int64_t(near_.size())}}, *smallest, *largest)
        .kth_largest(rank - above_);
  }
  int64_t copies(Key key) const { return std::count(near_.begin(), near_.end(), key); }
  int64_t above(Key key) const {
    return above_ + std::count_if(near_.begin(), near_.end(), [&](Key other) { return other > key; });
  }

 private:
  const int64_t size_;
  const OrderStatistics<Key> all_;
  std::vector<Key> near_;
  int64_t above_ = 0;  // keys above those
};

template <class Key>
SampledRange<Key> sampled_range(const std::vector<Key>& sample, const std::vector<int64_t>& ends, int64_t rank,
                                int64_t population, int64_t most_copies) {
  const int64_t size = int64_t(sample.size());
  const double fraction = double(rank) / double(population), expected = fraction * double(size);
  const int64_t centre = std::clamp<int64_t>(llround(expected), 1, size);
  const double binomial = double(size) * fraction * (1 - fraction);
  const auto width = [](double variance) { return llround(4 * std::sqrt(variance)) + 8; };
  Neighbourhood<Key> near(sample);
  near.move_to(centre - width(binomial), centre + width(binomial));
  const Key middle = near.kth_largest(centre);
  const double kept_ties = double(centre - near.above(middle)) / double(near.copies(middle));

  const double mean = expected / double(ends.size());
  double variance = 0;
  int64_t i = 0;
  for (const int64_t end : ends) {
    int count = 0;
    for (; i < end; ++i) count += sample[i] >= middle;
    variance += (count - mean) * (count - mean);
  }
  const int64_t half_width = width(std::max(variance, binomial));  // a miss costs more reads, never exactness
  near.move_to(centre - half_width, centre + half_width);
  SampledRange<Key> range;
  range.middle = middle;
  range.kept_ties = kept_ties;
  range.lo = centre + half_width > size ? 0 : near.kth_largest(centre + half_width);
  range.hi = centre - half_width < 1 ? kInfinityKey<Key> : near.kth_largest(centre - half_width);
  most_copies = std::max(most_copies, int64_t(half_width));
  range.crowded_ends = near.copies(range.lo) > most_copies || near.copies(range.hi) > most_copies;
  return range;
}

#define SK_INSTANTIATE(Key)                                                                                        \
  template class OrderStatistics<Key>;                                                                             \
  template SampledRange<Key> sampled_range(const std::vector<Key>&, const std::vector<int64_t>&, int64_t, int64_t, \
                                           int64_t);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

}  // namespace sk
