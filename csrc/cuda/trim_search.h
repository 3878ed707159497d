// One expert's search for its threshold, and what the steps of a trim share.
#pragma once
#include <cstdint>

#include "scope.h"
#include "trim.h"
#include "values.h"

namespace sk {
namespace cuda {
namespace {

constexpr int kPrefixBits = 15;
constexpr int kPrefixes = 1 << kPrefixBits;
constexpr int kRound = 64;  // round keys of a bracket that are counted, not collected
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xFFFFFFFF;

using Count = unsigned long long;

// One expert's search for its threshold.
template <class Key>
struct Search {
  int64_t keep;
  // The bracket. Task vectors of 16-bit dtypes, and those cast from them, repeat few values: keys whose bits below the
  // prefix are all 0 are counted, not collected; the one of them that the sample met most often has its own counter.
  Key lo, hi, peak;
  Count above, at_peak, round[kRound], collected;
  // The descent: the threshold is the rank-th largest key of [first, first + 2^width).
  Key first;
  int width;
  int64_t rank;
  bool missed;
  // The ties: `budget` of `ties` keys equal to the threshold stay.
  int64_t budget, ties;
  unsigned finished_blocks;

  __device__ bool is_open(int64_t numel) const { return keep > 0 && keep < numel; }
};

template <class Space>
constexpr int kLowBits = Space::kBits - kPrefixBits;

template <class Space, class S>
__device__ typename Space::Key key_at(const void* base, const void* expert, int64_t i, bool drop) {
  const S b = base ? static_cast<const S*>(base)[i] : S(), e = static_cast<const S*>(expert)[i];
  const auto key = key_of<Space>(task_vector(e, b, base != nullptr));
  return drop && key >= infinity_of<Space, S>() ? 0 : key;
}

// Any element of the scope, slowly.
template <class Space>
__device__ typename Space::Key key_at(const Part& part, const void* expert, int64_t i, bool drop) {
  typename Space::Key key = 0;
  with_stored<Space>(part.dtype, [&](auto s) { key = key_at<Space, decltype(s)>(part.base, expert, i, drop); });
  return key;
}

// The sum of `value` over this and all earlier threads of the block. sums: [32] shared.
template <class T>
__device__ T inclusive_scan(T value, T* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(kAll, value, step);
    if (lane >= step) value += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  if (warp == 0) {
    T sum = lane < warps ? sums[lane] : T(0);
    for (int step = 1; step < 32; step *= 2) {
      const T other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    sums[lane] = sum;
  }
  __syncthreads();
  return warp > 0 ? value + sums[warp - 1] : value;
}

}  // namespace
}  // namespace cuda
}  // namespace sk
