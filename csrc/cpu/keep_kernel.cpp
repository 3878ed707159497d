#include "keep_kernel.h"

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

constexpr int kWord = 32;  // elements of a step: bits are read and written as words

template <class C>
struct WordKeys {
  typename Vec<C>::Key v[kWord / Vec<C>::N];
};

template <class S, class... Count>
inline auto keys_at(const S* base, const S* expert, bool drop, Count... count) {
  using C = typename Compute<S>::type;
  Vec<C> tau = load(expert, count...);
  if (base) tau = round_to(tau - load(base, count...), S{});
  return magnitude(drop ? zero_unless_finite(tau) : tau);
}

template <class S>
inline WordKeys<typename Compute<S>::type> word_keys(const S* base, const S* expert, bool drop, int count) {
  using C = typename Compute<S>::type;
  constexpr int N = Vec<C>::N;
  WordKeys<C> keys;
  for (int j = 0; j < kWord; j += N) {
    const int left = count - j;
    const S* const b = base ? base + j : nullptr;
    keys.v[j / N] = left >= N ? keys_at(b, expert + j, drop) : keys_at(b, expert + j, drop, left < 0 ? 0 : left);
  }
  return keys;
}

template <class C>
inline uint32_t above(const WordKeys<C>& keys, typename Vec<C>::KeyLane limit) {
  using V = Vec<C>;
  uint32_t word = 0;
  for (int j = 0; j < kWord; j += V::N) word |= bits_of_lanes<C>(greater_key<C>(keys.v[j / V::N], V::keys(limit))) << j;
  return word;
}

template <class S, bool keep>
void clear(const void* base_, const void* expert_, int64_t n, Bound<typename Compute<S>::Key> bound, bool drop,
           uint8_t* bits) {
  using C = typename Compute<S>::type;
  const S* base = static_cast<const S*>(base_);
  const S* expert = static_cast<const S*>(expert_);
  for (int64_t i = 0; i < n; i += kWord) {
    const int count = n - i < kWord ? int(n - i) : kWord;
    const auto keys = word_keys(base ? base + i : nullptr, expert + i, drop, count);
    const int64_t until_cut = bound.cut - i;
    uint32_t word = above<C>(keys, until_cut > 0 ? bound.before : bound.after);
    if (until_cut > 0 && until_cut < kWord) {
      const uint32_t first = (uint32_t(1) << until_cut) - 1;
      word = (word & first) | (above<C>(keys, bound.after) & ~first);
    }
    if constexpr (!keep) word = ~word | above<C>(keys, kInfinityKey<typename Compute<S>::Key>);
    uint32_t given = 0;
    memcpy(&given, bits + i / 8, size_t(count + 7) / 8);
    given &= word;
    memcpy(bits + i / 8, &given, size_t(count + 7) / 8);
  }
}

template <class S>
constexpr KeepKernel<typename Compute<S>::Key> kernel() {
  return {clear<S, true>, clear<S, false>};
}

}  // namespace

const KeepKernels keep_kernels = {kernel<float>(), kernel<Half>(), kernel<BFloat16>(), kernel<double>()};

}  // namespace SK_ISA
}  // namespace sk
