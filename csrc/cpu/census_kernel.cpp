#include "census_kernel.h"

#include <algorithm>

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

inline int64_t ones(uint64_t word) { return __builtin_popcountll(word); }

// The key of the largest finite number.
template <class S>
constexpr typename Compute<S>::Key kLargest = 0x7F7FFFFF;
template <>
inline constexpr int32_t kLargest<BFloat16> = 0x7F7F0000;
template <>
inline constexpr int32_t kLargest<Half> = 0x477FE000;
template <>
inline constexpr int64_t kLargest<double> = 0x7FEFFFFFFFFFFFFF;

// The elements of a word in registers.
template <class S>
struct Elements {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  static constexpr int kVectors = kWord / V::N;

  V at[kVectors];

  static Elements read(const S* p, int count) {
    Elements word;
    for (int v = 0; v < kVectors; ++v) {
      const int left = count - v * V::N;
      word.at[v] = left >= V::N ? load(p + v * V::N) : left > 0 ? load(p + v * V::N, left) : V::set(0);
    }
    return word;
  }
};

// One bit of every element for which `holds` gives a mask.
template <class S, class Holds>
inline uint64_t bits_where(const Elements<S>& x, const Holds& holds) {
  using C = typename Compute<S>::type;
  uint64_t word = 0;
  for (int v = 0; v < Elements<S>::kVectors; ++v) word |= uint64_t(bits_of_lanes<C>(holds(x.at[v]))) << v * Vec<C>::N;
  return word;
}

// x[l] of a word, its two halves one after the other, to the sum of its lane.
template <class C>
inline void add_lanes(const C* x, double* sums) {
  for (int half = 0; half < kWord; half += kSumLanes)
    for (int l = 0; l < kSumLanes; ++l) sums[l] += double(x[half + l]);
}

template <class S>
void count_model(const Elements<S>& x, uint64_t there, int64_t model, const CensusCounts& place, int64_t* counts) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const auto above = [&](typename Compute<S>::Key key) {
    const auto keys = V::keys(key);
    return bits_where(x, [&](V of) { return greater_key<C>(magnitude(of), keys); });
  };
  const uint64_t beyond = above(kLargest<S>);
  counts[place.zeros() + model] += ones(~above(0) & there);
  counts[place.nonfinite() + model] += ones(beyond);
  counts[place.saturated() + model] += ones(above(kLargest<S> - 1) & ~beyond);
}

template <class S>
void add(const CensusArgs<typename Compute<S>::Key>& args, uint64_t* words, int64_t* counts, double* sums) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const int n = args.num_tasks;
  const CensusCounts place{n};
  const CensusSums sum{n};
  uint64_t *const up = words, *const down = words + n;
  for (int64_t begin = 0; begin < args.count; begin += kWord) {
    const int count = int(std::min<int64_t>(kWord, args.count - begin));
    const uint64_t there = count == kWord ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    const Elements<S> base = Elements<S>::read(static_cast<const S*>(args.base) + begin, count);
    count_model(base, there, 0, place, counts);
    alignas(64) C lanes[kWord];
    double squares[kWord];
    for (int v = 0; v < Elements<S>::kVectors; ++v) store(zero_unless_finite(base.at[v]), lanes + v * V::N);
    for (int l = 0; l < kWord; ++l) squares[l] = double(lanes[l]) * double(lanes[l]);
    add_lanes(squares, sums + sum.base_square() * kSumLanes);

    V upwards[Elements<S>::kVectors], downwards[Elements<S>::kVectors];
    std::fill_n(upwards, Elements<S>::kVectors, V::set(0));
    std::fill_n(downwards, Elements<S>::kVectors, V::set(0));
    uint64_t any_up = 0, any_down = 0, kept_up = 0, kept_down = 0, kept = 0, kept_twice = 0;
    for (int t = 0; t < n; ++t) {
      const Elements<S> expert = Elements<S>::read(static_cast<const S*>(args.experts[t]) + begin, count);
      count_model(expert, there, t + 1, place, counts);
      Elements<S> change;
      for (int v = 0; v < Elements<S>::kVectors; ++v) {
        change.at[v] = zero_unless_finite(expert.at[v] - base.at[v]);
        const auto above = greater<C>(change.at[v], V::set(0)), below = greater<C>(V::set(0), change.at[v]);
        upwards[v] = upwards[v] + zero_unless<C>(above, change.at[v]);
        downwards[v] = downwards[v] - zero_unless<C>(below, change.at[v]);
        store(absolute(change.at[v]), lanes + v * V::N);
      }
      add_lanes(lanes, sums + (sum.mass() + t) * kSumLanes);
      up[t] = bits_where(change, [](V x) { return greater<C>(x, V::set(0)); });
      down[t] = bits_where(change, [](V x) { return greater<C>(V::set(0), x); });
      any_up |= up[t];
      any_down |= down[t];
      counts[place.changed() + t] += ones(up[t] | down[t]);
      if (args.thresholds) {
        const auto limit = V::keys(args.thresholds[t] - 1);
        const uint64_t held =
            bits_where(change, [&](V x) { return greater_key<C>(magnitude(x), limit); }) & (up[t] | down[t]);
        counts[place.kept() + t] += ones(held);
        kept_twice |= kept & held;
        kept |= held;
        kept_up |= held & up[t];
        kept_down |= held & down[t];
      }
      for (int other = 0; other < t; ++other) {
        const int64_t pair = other * n + t;
        counts[place.both() + pair] += ones((up[t] | down[t]) & (up[other] | down[other]));
        counts[place.against() + pair] += ones((up[t] & down[other]) | (down[t] & up[other]));
      }
    }
    for (int v = 0; v < Elements<S>::kVectors; ++v)
      store(select<C>(greater<C>(upwards[v], downwards[v]), downwards[v], upwards[v]), lanes + v * V::N);
    add_lanes(lanes, sums + sum.lesser() * kSumLanes);
    counts[place.touched()] += ones(any_up | any_down);
    counts[place.conflicts()] += ones(any_up & any_down);
    counts[place.kept_by_any()] += ones(kept);
    counts[place.kept_by_two()] += ones(kept_twice);
    counts[place.kept_conflicts()] += ones(kept_up & kept_down);
  }
}

}  // namespace

const CensusKernels census_kernels = {{add<float>, add<Half>, add<BFloat16>, add<double>}};

}  // namespace SK_ISA
}  // namespace sk
