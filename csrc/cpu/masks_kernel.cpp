#include "masks_kernel.h"

#include <type_traits>

#include "block_sums.h"
#include "random_bits.h"
#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

static_assert(kWords <= kWordSlack && kSumLanes % Vec<float>::N == 0);

// The lanes whose bit is set, lane 0 at the lowest.
template <class C>
inline typename Vec<C>::Mask lanes_where(uint32_t bits) {
  using V = Vec<C>;
  if constexpr (std::is_integral_v<typename V::Mask>) {
    return typename V::Mask(bits);
  } else {
    typename V::Mask lanes;
    for (int i = 0; i < V::N; ++i) lanes[i] = -typename V::KeyLane(bits >> i & 1);
    return lanes;
  }
}

template <class S>
inline Vec<typename Compute<S>::type> magnitudes(const S* base, const S* expert, bool drop, int count) {
  using V = Vec<typename Compute<S>::type>;
  const bool whole = count >= V::N;
  V x = whole ? load(expert) : load(expert, count);
  if (base) x = x - (whole ? load(base) : load(base, count));
  x = absolute(round_to(x, S{}));
  return drop ? zero_unless_finite(x) : x;
}

template <class S>
MaskSums sums(const void* base_, const void* expert_, int64_t n, bool drop, const uint8_t* bits) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const S* base = static_cast<const S*>(base_);
  const S* expert = static_cast<const S*>(expert_);
  double all[kSumLanes] = {}, kept_norm[kSumLanes] = {};
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kSumLanes) {
    const int count = n - i < kSumLanes ? int(n - i) : kSumLanes;
    uint32_t word = 0;
    memcpy(&word, bits + i / 8, size_t(count + 7) / 8);
    kept += __builtin_popcount(word);
    C x[kSumLanes], chosen[kSumLanes];
    for (int j = 0; j < kSumLanes; j += V::N) {
      const int left = count - j;
      const V v = magnitudes(base ? base + i + j : nullptr, expert + i + j, drop, left < 0 ? 0 : left);
      store(v, x + j);
      store(zero_unless<C>(lanes_where<C>(word >> j), v), chosen + j);
    }
    for (int j = 0; j < kSumLanes; ++j) {
      all[j] += double(x[j]);
      kept_norm[j] += double(chosen[j]);
    }
  }
  return {kept, fold_halves(all, kSumLanes), fold_halves(kept_norm, kSumLanes)};
}

}  // namespace

const MasksKernels masks_kernels = {bits_below, words_of, {sums<float>, sums<Half>, sums<BFloat16>, sums<double>}};

}  // namespace SK_ISA
}  // namespace sk
