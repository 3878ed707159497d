#include "trim_kernel.h"

#include "vec.h"

namespace sk {
namespace SK_ISA {
namespace {

// The task vector as the toolkits store it: rounded to the storage dtype.
template <class S, class... Count>
inline auto task_vector(const S* base, const S* expert, int64_t i, Count... count) {
  const auto x = load(expert + i, count...);
  return base ? round_to(x - load(base + i, count...), S{}) : x;
}

template <class S, class... Count>
inline auto key_at(const S* base, const S* expert, int64_t i, bool drop, Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const auto key = magnitude<C>(task_vector(base, expert, i, count...));
  return drop ? zero_key_where<C>(greater_key<C>(key, V::keys(kInfinityKey<typename V::KeyLane> - 1)), key) : key;
}

template <class S>
Counts<typename Compute<S>::Key> count(const void* base_, const void* expert_, int64_t n,
                                       Bracket<typename Compute<S>::Key> bracket, bool drop,
                                       typename Compute<S>::Key* inside) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const S* base = static_cast<const S*>(base_);
  const S* expert = static_cast<const S*>(expert_);
  const auto hi = V::keys(bracket.hi), below_hi = V::keys(bracket.hi - 1);
  const auto lo = V::keys(bracket.lo), below_lo = V::keys(bracket.lo - 1);
  auto above = V::keys(0), from_hi = above, from_lo = above, largest = above;
  auto* end = inside;
  const auto add = [&](auto key, auto lanes) {
    const auto ge_hi = greater_key<C>(key, below_hi) & lanes, ge_lo = greater_key<C>(key, below_lo) & lanes;
    largest = max_key<C>(largest, key);
    above = tally<C>(above, greater_key<C>(key, hi) & lanes);
    from_hi = tally<C>(from_hi, ge_hi);
    from_lo = tally<C>(from_lo, ge_lo);
    end += compress<C>(and_not<C>(greater_key<C>(key, lo) & lanes, ge_hi), key, end);
  };
  int64_t i = 0;
  for (; i + V::N <= n; i += V::N) add(key_at(base, expert, i, drop), V::all());
  if (i < n) add(key_at(base, expert, i, drop, int(n - i)), V::first(int(n - i)));

  Counts<typename V::KeyLane> c;
  c.above = sum_keys<C>(above);
  c.at_hi = sum_keys<C>(from_hi) - c.above;
  c.inside = end - inside;
  c.at_lo = sum_keys<C>(from_lo) - c.above - c.at_hi - c.inside;
  c.largest = max_lane<C>(largest);
  return c;
}

template <class S>
void keys(const void* base_, const void* expert_, int64_t n, bool drop, typename Compute<S>::Key* out) {
  using C = typename Compute<S>::type;
  constexpr int N = Vec<C>::N;
  const S* base = static_cast<const S*>(base_);
  const S* expert = static_cast<const S*>(expert_);
  int64_t i = 0;
  for (; i + N <= n; i += N) store_keys<C>(key_at(base, expert, i, drop), out + i);
  if (i < n) store_keys<C>(key_at(base, expert, i, drop, int(n - i)), out + i);
}

// Sixteen running sums whatever the vector width: element i always lands in sum i % 16.
template <class S>
L1Norms l1_norms(const void* base_, const void* expert_, int64_t n, typename Compute<S>::Key limit, bool drop) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  constexpr int kSums = 16, kStep = kSums / V::N;
  const S* base = static_cast<const S*>(base_);
  const S* expert = static_cast<const S*>(expert_);
  double all[kSums] = {}, kept[kSums] = {};
  C x[kSums];
  typename V::KeyLane key[kSums];
  for (int64_t i = 0; i < n; i += kSums) {
    const int count = n - i < kSums ? int(n - i) : kSums;
    for (int s = 0; s < kStep; ++s) {
      const int left = count - s * V::N, lanes = left < 0 ? 0 : left < V::N ? left : V::N;
      store_keys<C>(key_at(base, expert, i + s * V::N, drop, lanes), key + s * V::N);
    }
    memcpy(x, key, sizeof x);
    for (int j = 0; j < kSums; ++j) {
      all[j] += double(x[j]);
      kept[j] += key[j] > limit ? double(x[j]) : 0.0;
    }
  }
  L1Norms norms = {0, 0};
  for (int j = 0; j < kSums; ++j) {
    norms.all += all[j];
    norms.kept += kept[j];
  }
  return norms;
}

template <class S>
constexpr TrimKernel<typename Compute<S>::Key> kernel() {
  return {count<S>, keys<S>, l1_norms<S>};
}

}  // namespace

const TrimKernels trim_kernels = {kernel<float>(), kernel<Half>(), kernel<BFloat16>(), kernel<double>()};

}  // namespace SK_ISA
}  // namespace sk
