// Where the threshold of every expert is expected: a histogram of a sample, and the range of keys around its rank.
#pragma once
#include "trim_search.h"

namespace sk {
namespace cuda {
namespace {

constexpr int64_t kSamples = 1 << 16;  // of each expert: the bracket holds its threshold and 1 or 2 % of the rest
constexpr int kScan = 1024;            // threads that look through kPrefixes bins

__device__ inline unsigned scramble(unsigned x) {
  x = (x ^ (x >> 16)) * 0x7FEB352D;
  x = (x ^ (x >> 15)) * 0x846CA68B;
  return x ^ (x >> 16);
}

// Places spread evenly over the scope, each at a pseudo-random point of its stride; a small scope entirely.
template <class Space>
__global__ void survey(Scope scope, const Search<typename Space::Key>* searches, unsigned* histograms, bool drop) {
  const int task = blockIdx.y;
  if (!searches[task].is_open(scope.numel)) return;
  const int64_t samples = scope.numel < kSamples ? scope.numel : kSamples;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool valid = i < samples;
  int prefix = -1;
  if (valid) {
    int64_t place = i;
    if (scope.numel > samples) {
      const double stride = double(scope.numel) / double(samples);
      place = int64_t((double(i) + double(scramble(unsigned(i))) * 0x1p-32) * stride);
      place = place < scope.numel ? place : scope.numel - 1;
    }
    const int part = scope.find(&Part::offset, place);
    prefix = int(key_at<Space>(scope.parts[part], scope.expert(part, task), place - scope.parts[part].offset, drop) >>
                 kLowBits<Space>);
  }
  // Many samples may be alike: one addition for all of a warp.
  const unsigned peers = __match_any_sync(kAll, prefix);
  if (valid && __popc(peers & ((1u << (threadIdx.x % 32)) - 1)) == 0)
    atomicAdd(&histograms[int64_t(task) * kPrefixes + prefix], unsigned(__popc(peers)));
}

// One block per expert: the range of keys around the place where the threshold would be in the sample.
template <class Space>
__global__ void __launch_bounds__(kScan)
    set_bracket(Scope scope, Search<typename Space::Key>* searches, Limit<typename Space::Limit>* limits,
                const unsigned* histograms, bool force_descent) {
  using Key = typename Space::Key;
  constexpr int kOwn = kPrefixes / kScan;
  __shared__ unsigned sums[32];
  __shared__ int ends[2];
  __shared__ Count fullest;
  Search<Key>& search = searches[blockIdx.x];
  if (!search.is_open(scope.numel)) {
    if (threadIdx.x == 0) {
      search.lo = search.hi = search.peak = kMaxKey<Key>;
      limits[blockIdx.x] = {search.keep > 0 ? 0 : kInfinityKey<typename Space::Limit>,
                            search.keep > 0 ? scope.numel : 0};
    }
    return;
  }
  const int64_t samples = scope.numel < kSamples ? scope.numel : kSamples;
  int64_t upper = search.keep, lower = search.keep;  // ranks in the sample
  if (samples < scope.numel) {
    const double fraction = double(search.keep) / double(scope.numel), expected = fraction * double(samples);
    // A miss costs more reads, never exactness.
    const int64_t half_width = int64_t(4 * sqrt(double(samples) * fraction * (1 - fraction))) + 8;
    upper = int64_t(expected) - half_width;
    lower = int64_t(expected) + half_width;
  }
  if (threadIdx.x == 0) {
    ends[0] = 0;
    ends[1] = kPrefixes - 1;
    fullest = 0;
  }
  // Thread 0 holds the largest prefixes.
  const unsigned* mine = histograms + (int64_t(blockIdx.x) + 1) * kPrefixes - (threadIdx.x + 1) * kOwn;
  unsigned count = 0;
  for (int b = 0; b < kOwn; ++b) count += mine[b];
  const int64_t through = inclusive_scan(count, sums), before = through - count;
  const int64_t ranks[2] = {lower, upper};
  for (int end = 0; end < 2; ++end) {
    if (ranks[end] <= before || ranks[end] > through) continue;
    int64_t left = ranks[end] - before;
    int b = kOwn - 1;
    for (; left > mine[b]; --b) left -= mine[b];
    ends[end] = kPrefixes - int(threadIdx.x + 1) * kOwn + b;
  }
  __syncthreads();
  for (int b = 0; b < kOwn; ++b) {
    const int prefix = kPrefixes - int(threadIdx.x + 1) * kOwn + b;
    if (prefix >= ends[0] && prefix <= ends[1]) atomicMax(&fullest, Count(mine[b]) << kPrefixBits | Count(prefix));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    search.lo = Key(ends[0]) << kLowBits<Space>;
    search.hi = (Key(ends[1]) << kLowBits<Space>) | ((Key(1) << kLowBits<Space>)-1);
    search.peak = Key(fullest % kPrefixes) << kLowBits<Space>;
    if (force_descent) search.lo = search.hi = search.peak = kMaxKey<Key>;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace sk
