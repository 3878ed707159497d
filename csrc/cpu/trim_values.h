// Keys of a 16-bit dtype counted by their rounded values, where a bracket holds few of those: with no branch, and two
// comparisons of 16 bits in the place of one of 32. For kernel files only.
#pragma once
#include <type_traits>

#include "simd/vec.h"
#include "trim_kernel.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kMostValues = 10;  // boundaries between values

constexpr int64_t kMostShort = 1 << 17;  // elements whose number a lane of 16 bits can hold

// Every chunk starts a new stream, before the hardware's own prefetching has caught on.
template <class S>
inline void prefetch_expert(const S* expert) {
  constexpr size_t kAhead = 4096;
  for (size_t line = 0; line < Block<typename Compute<S>::type>::N * sizeof(S); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(expert) + kAhead + line);
}

// The bits of a magnitude as S rounds it, and the magnitude that has some bits.
template <class S>
inline int to_stored(int32_t key) {
  float value;
  memcpy(&value, &key, sizeof value);
  S lanes[Vec<float>::N];
  store(Vec<float>::set(value), lanes);
  return lanes[0].bits;
}
template <class S>
inline int32_t to_key(int stored) {
  S lanes[Vec<float>::N] = {};
  lanes[0].bits = uint16_t(stored);
  int32_t keys[Vec<float>::N];
  store_keys<float>(magnitude(load(lanes)), keys);
  return keys[0];
}

// A bracket in rounded values: count how many keys exceed each of `first` to `first + count - 1`.
template <class S>
struct Values {
  int first = 0, count = 0, lo = 0, hi = 0;  // lo, hi: those of the bracket, from `first` on

  explicit Values(const Bracket<int32_t>& bracket) {
    if (std::is_same_v<S, Half> && !kConvertsHalf) return;
    constexpr int32_t kLeast = std::is_same_v<S, Half> ? 0 : 0x01000000, kMost = 0x47000000;
    const int32_t bounds[4] = {bracket.bottom, bracket.lo, bracket.hi, bracket.top};
    int at[4];
    for (int b = 0; b < 4; ++b) {
      if (bounds[b] < kLeast || bounds[b] > kMost) return;  // keys are rounded as normal numbers
      at[b] = to_stored<S>(bounds[b]);
      if (to_stored<S>(bounds[b] + 1) != at[b] + 1) return;  // between two keys of one value
    }
    if (at[3] - at[0] >= kMostValues) return;
    first = at[0], count = at[3] - at[0] + 1, lo = at[1] - first, hi = at[2] - first;
  }
};

template <class S>
inline Shorts keys_of(Block<float> expert, Block<float> base) {
  Block<float> tau = {{expert.v[0] - base.v[0], expert.v[1] - base.v[1]}};
  if constexpr (std::is_same_v<S, BFloat16>)
    for (Vec<float>& x : tau.v) x = round_normal<S>(x);
  return magnitudes(tau, S{});
}

// above[v]: how many keys exceed first + v. Returns the largest.
template <class S, int kCount>
int count_above(const S* base, const S* expert, int64_t n, int first, int64_t* above) {
  constexpr int N = Shorts::N;
  Shorts bounds[kCount], over[kCount], largest = Shorts::set(0);
  for (int v = 0; v < kCount; ++v) bounds[v] = Shorts::set(int16_t(first + v)), over[v] = Shorts::set(0);
  const auto add = [&](Shorts keys) {
    largest = larger(largest, keys);
    for (int v = 0; v < kCount; ++v) over[v] = tally_above(over[v], keys, bounds[v]);
  };
  const Block<float> zeros = {{Vec<float>::set(0), Vec<float>::set(0)}};
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    prefetch_expert(expert + i);
    add(keys_of<S>(load_block(expert + i), base ? load_block(base + i) : zeros));
  }
  if (i < n) {
    const int left = int(n - i);
    add(keys_of<S>(load_block(expert + i, left), base ? load_block(base + i, left) : zeros));
  }
  int16_t lanes[N];
  for (int v = 0; v < kCount; ++v) {
    memcpy(lanes, &over[v], sizeof lanes);
    above[v] = 0;
    for (const int16_t lane : lanes) above[v] += lane;
  }
  memcpy(lanes, &largest, sizeof lanes);
  int most = 0;
  for (const int16_t lane : lanes) most = lane > most ? lane : most;
  return most;
}

template <class S>
Counts<int32_t> count_values(const S* base, const S* expert, int64_t n, const Values<S>& values, int32_t* inside) {
  int64_t above[kMostValues];
  const auto run = values.count <= 3   ? count_above<S, 3>
                   : values.count <= 6 ? count_above<S, 6>
                                       : count_above<S, kMostValues>;
  const int largest = run(base, expert, n, values.first, above);
  const int lo = values.lo, hi = values.hi, top = values.count - 1;
  int32_t* end = inside;
  for (int v = lo + 1; v <= hi; ++v) {
    const int32_t key = to_key<S>(values.first + v);
    for (int64_t copies = above[v - 1] - above[v]; copies > 0; --copies) *end++ = key;
  }
  return {above[top], above[hi] - above[top], end - inside, above[0] - above[lo], to_key<S>(largest)};
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
