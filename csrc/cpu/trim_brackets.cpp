#include "trim_brackets.h"

#include <algorithm>
#include <cmath>

#include "select.h"
#include "trim_keys.h"
#include "trim_tally.h"

namespace sk {
namespace {

constexpr int64_t kDirect = 1 << 10;        // up to here every key is a candidate: no sample is worth its time
constexpr int64_t kCluster = 16;            // neighbouring elements per sampled place: one cache line of float32
constexpr int64_t kLarger = 4;              // sample of a merge: it costs less than what it leaves to correct
constexpr int64_t kCopies = 32;             // of a sample one of so many may be copies that get places
constexpr int64_t kAhead = 12;              // places prefetched
constexpr int64_t kPlacesMapped = 1 << 10;  // sampled between two times that pages are given back: a fault maps 64 KiB

}  // namespace

template <class Key>
Bracket<Key> bracket_of(const Scope& scope, Key lo, Key hi, bool counts_ends) {
  const Interval<Key> low = ties_of(scope, lo), high = ties_of(scope, hi);
  if (!counts_ends) return {low.first - 1, low.first - 1, high.last, high.last};
  if (lo == hi) return {low.first - 1, low.first - 1, low.first - 1, low.last};
  return {low.first - 1, low.last, high.first - 1, high.last};
}

// Places spread evenly over the scope, each at a pseudo-random point of its stride.
template <class Key>
Expected<Key> expected(const Scope& scope, const std::vector<int64_t>& tasks, const std::vector<int64_t>& rank,
                       bool drop, Wanted wanted) {
  const size_t slots = tasks.size();
  if (scope.numel <= kDirect)
    return {std::vector<Bracket<Key>>(slots, {-1, -1, kMaxKey<Key>, kMaxKey<Key>}), std::vector<Key>(slots),
            std::vector<int64_t>(slots, scope.numel)};
  // The sample costs its size, the candidates cost numel / sqrt(size): the sum is least near numel^(2/3).
  const int64_t places = (wanted == Wanted::places ? kLarger : 1) *
                         int64_t(std::cbrt(double(scope.numel) * double(scope.numel))) / kCluster;
  struct Cluster {
    const Part* part;
    int64_t begin, n;
  };
  std::vector<Cluster> clusters;
  uint64_t random = 0x9E3779B97F4A7C15;
  for (int64_t j = 0; j < places; ++j) {
    random = random * 6364136223846793005 + 1442695040888963407;
    const double stride = double(scope.numel) / double(places);
    const int64_t position = std::min(scope.numel - 1, int64_t((double(j) + double(random >> 11) * 0x1p-53) * stride));
    const Part& part = scope.part_of(position);
    const int64_t begin = std::max<int64_t>(0, std::min(position - part.offset, part.numel - kCluster));
    clusters.push_back({&part, begin, std::min(kCluster, part.numel - begin)});
  }
  Expected<Key> found{std::vector<Bracket<Key>>(slots), std::vector<Key>(slots),
                      std::vector<int64_t>(slots, scope.numel)};
  for_each_expert(scope, int64_t(slots), [&](int64_t first, int64_t last) {
    std::vector<Key> sample;
    std::vector<int64_t> ends(places);
    KeyReader<Key> reader(scope);
    for (int64_t s = first; s < last; ++s) {
      sample.resize(places * kCluster + kSlack);
      int64_t size = 0;
      for (int64_t j = 0; j < places; ++j) {
        if (j % kPlacesMapped == kPlacesMapped - 1) give_back_mapped();
        if (!scope.formed && j + kAhead < places) {  // every cluster is a miss of all caches
          const Cluster& later = clusters[size_t(j + kAhead)];
          __builtin_prefetch(later.part->expert_at(tasks[s], later.begin));
          if (later.part->base) __builtin_prefetch(later.part->base_at(later.begin));
        }
        const auto [part, begin, n] = clusters[size_t(j)];
        reader.move_to(*part, begin, n);
        reader.kernel().keys(reader.base(), reader.expert(tasks[s]), n, drop, sample.data() + size);
        ends[j] = size += n;
      }
      sample.resize(size);
      const SampledRange<Key> range =
          sampled_range(sample, ends, rank[s], scope.numel, wanted == Wanted::places ? size / kCopies : 0);
      found.brackets[s] = bracket_of(scope, range.lo, range.hi, range.crowded_ends);
      found.middles[s] = stored_key(scope, range.middle);
      found.cuts[s] = int64_t(range.kept_ties * double(scope.numel));
    }
  });
  return found;
}

#define SK_INSTANTIATE(Key)                                       \
  template Bracket<Key> bracket_of(const Scope&, Key, Key, bool); \
  template Expected<Key> expected(const Scope&, const std::vector<int64_t>&, const std::vector<int64_t>&, bool, Wanted);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

}  // namespace sk
