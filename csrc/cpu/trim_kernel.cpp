#include "trim_kernel.h"

#include "simd/vec.h"
#include "trim_values.h"

namespace sk {
namespace SK_ISA {
namespace {

template <class C>
struct BlockKeys {
  typename Vec<C>::Key v[2];
};

// The first key that is, or rounds to, infinity.
template <class S, bool rounded>
constexpr typename Compute<S>::Key kNonFinite = kInfinityKey<typename Compute<S>::Key>;
template <>
inline constexpr int32_t kNonFinite<Half, false> = 0x477FF000;
template <>
inline constexpr int32_t kNonFinite<BFloat16, false> = 0x7F7F8000;

template <class S, bool rounded, class C>
inline typename Vec<C>::Key key_of(Vec<C> expert, Vec<C> base, bool drop) {
  Vec<C> tau = expert - base;
  if (rounded) tau = round_to(tau, S{});
  const auto key = magnitude(tau);
  return drop ? zero_key_where<C>(greater_key<C>(key, Vec<C>::keys(kNonFinite<S, rounded> - 1)), key) : key;
}

template <class S, bool rounded, class... Count>
inline auto block_keys(const S* base, const S* expert, int64_t i, bool drop, Count... count) {
  using C = typename Compute<S>::type;
  const Block<C> e = load_block(expert + i, count...);
  Block<C> b = {Vec<C>::set(0), Vec<C>::set(0)};
  if (base) b = load_block(base + i, count...);
  return BlockKeys<C>{key_of<S, rounded>(e.v[0], b.v[0], drop), key_of<S, rounded>(e.v[1], b.v[1], drop)};
}

// The indices of a block's elements, lane by lane.
template <class S>
inline auto first_indices() {
  using C = typename Compute<S>::type;
  typename Vec<C>::KeyLane lanes[Block<C>::N];
  for (int l = 0; l < Vec<C>::N; ++l)
    for (int h = 0; h < 2; ++h) lanes[h * Vec<C>::N + l] = kInterleaved<S> ? 2 * l + h : h * Vec<C>::N + l;
  BlockKeys<C> indices;
  memcpy(indices.v, lanes, sizeof lanes);
  return indices;
}

template <class S, bool rounded, bool counts_ends, bool located>
Counts<typename Compute<S>::Key> count(const S* base, const S* expert, int64_t n,
                                       Bracket<typename Compute<S>::Key> bracket, bool drop,
                                       typename Compute<S>::Key* inside, typename Compute<S>::Key* at) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  constexpr int N = Block<C>::N;
  auto index = first_indices<S>();
  const auto top = V::keys(bracket.top), hi = V::keys(bracket.hi), lo = V::keys(bracket.lo),
             bottom = V::keys(bracket.bottom);
  auto over_top = V::keys(0), over_hi = over_top, over_bottom = over_top, largest = over_top;
  auto* end = inside;
  const auto add = [&](auto key, auto indices, auto lanes) {
    largest = max_key<C>(largest, key);
    const auto gt_hi = greater_key<C>(key, hi) & lanes;
    over_hi = tally<C>(over_hi, gt_hi);
    if constexpr (counts_ends) {
      over_top = tally<C>(over_top, greater_key<C>(key, top) & lanes);
      over_bottom = tally<C>(over_bottom, greater_key<C>(key, bottom) & lanes);
    }
    const auto chosen = and_not<C>(greater_key<C>(key, lo) & lanes, gt_hi);
    if constexpr (located) compress<C>(chosen, indices, at + (end - inside));
    end += compress<C>(chosen, key, end);
  };
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    prefetch_expert(expert + i);
    const auto key = block_keys<S, rounded>(base, expert, i, drop);
    add(key.v[0], index.v[0], V::all());
    add(key.v[1], index.v[1], V::all());
    if constexpr (located)
      for (auto& indices : index.v) indices = add_keys<C>(indices, V::keys(N));
  }
  if (i < n) {
    const int left = int(n - i);
    const auto key = block_keys<S, rounded>(base, expert, i, drop, left);
    add(key.v[0], index.v[0], lanes_of<S>(0, left));
    add(key.v[1], index.v[1], lanes_of<S>(1, left));
  }
  Counts<typename V::KeyLane> c = {sum_keys<C>(over_hi), 0, end - inside, 0, max_lane<C>(largest)};
  if constexpr (counts_ends) {
    c.at_hi = c.above - sum_keys<C>(over_top);
    c.above -= c.at_hi;
    c.at_lo = sum_keys<C>(over_bottom) - c.above - c.at_hi - c.inside;
  }
  return c;
}

template <class S, bool located>
Counts<typename Compute<S>::Key> count_or_locate(const void* base_, const void* expert_, int64_t n,
                                                 Bracket<typename Compute<S>::Key> bracket, bool rounded, bool drop,
                                                 typename Compute<S>::Key* inside, typename Compute<S>::Key* at) {
  const S* base = static_cast<const S*>(base_);
  const S* expert = static_cast<const S*>(expert_);
  const bool counts_ends = bracket.top != bracket.hi || bracket.bottom != bracket.lo;
  if constexpr (sizeof(S) == 2 && !located)
    if (const Values<S> values(bracket); values.count > 0 && !rounded && !drop && n <= kMostShort)
      return count_values<S>(base, expert, n, values, inside);
  if constexpr (sizeof(S) == 2)
    if (rounded)
      return counts_ends ? count<S, true, true, located>(base, expert, n, bracket, drop, inside, at)
                         : count<S, true, false, located>(base, expert, n, bracket, drop, inside, at);
  return counts_ends ? count<S, false, true, located>(base, expert, n, bracket, drop, inside, at)
                     : count<S, false, false, located>(base, expert, n, bracket, drop, inside, at);
}

template <class S>
Counts<typename Compute<S>::Key> count(const void* base, const void* expert, int64_t n,
                                       Bracket<typename Compute<S>::Key> bracket, bool rounded, bool drop,
                                       typename Compute<S>::Key* inside) {
  return count_or_locate<S, false>(base, expert, n, bracket, rounded, drop, inside, nullptr);
}

template <class S>
inline auto rounded_key_at(const S* base, const S* expert, int64_t i, bool drop, int count) {
  using C = typename Compute<S>::type;
  const bool whole = count >= Vec<C>::N;
  const Vec<C> e = whole ? load(expert + i) : load(expert + i, count);
  Vec<C> b = Vec<C>::set(0);
  if (base) b = whole ? load(base + i) : load(base + i, count);
  return key_of<S, true>(e, b, drop);
}

template <class S>
void keys(const void* base, const void* expert, int64_t n, bool drop, typename Compute<S>::Key* out) {
  using C = typename Compute<S>::type;
  for (int64_t i = 0; i < n; i += Vec<C>::N) {
    const int count = n - i < Vec<C>::N ? int(n - i) : Vec<C>::N;
    store_keys<C>(rounded_key_at(static_cast<const S*>(base), static_cast<const S*>(expert), i, drop, count), out + i);
  }
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
      const int left = count - s * V::N, lanes = left < 0 ? 0 : left;
      store_keys<C>(rounded_key_at(base, expert, i + s * V::N, drop, lanes), key + s * V::N);
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
  return {count<S>, count_or_locate<S, true>, keys<S>, l1_norms<S>};
}

}  // namespace

const TrimKernels trim_kernels = {kernel<float>(), kernel<Half>(), kernel<BFloat16>(), kernel<double>()};

}  // namespace SK_ISA
}  // namespace sk
