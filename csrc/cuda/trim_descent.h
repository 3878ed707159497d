// A radix descent to the exact threshold: among the candidates of a bracket, or, where it missed, over the tensors.
#pragma once
#include <type_traits>

#include "trim_search.h"

namespace sk {
namespace cuda {
namespace {

constexpr int kRadixBits = 11;
constexpr int kBins = 1 << kRadixBits;

// Where the descent begins: among what the bracket holds.
template <class Space>
__device__ void begin(Search<typename Space::Key>& search, int64_t capacity) {
  Count inside = search.at_peak + search.collected;
  for (int r = 0; r < kRound; ++r) inside += search.round[r];
  search.first = search.lo;
  search.width = 0;
  while (search.width < Space::kBits && (search.hi - search.lo) >> search.width) ++search.width;
  search.rank = search.keep - int64_t(search.above);
  search.missed = search.rank <= 0 || search.rank > int64_t(inside) || int64_t(search.collected) > capacity;
}

// What the keys of a descent are counted from: the candidates of the bracket, or every tensor.
template <class Space>
struct Candidates {
  const typename Space::Key* keys;  // [num_tasks, capacity]
  int64_t capacity;

  static constexpr bool kFallback = false;

  template <class Add>
  __device__ void for_each(const Search<typename Space::Key>& search, int task, const Add& add) const {
    const int64_t step = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < int64_t(search.collected); i += step)
      add(keys[task * capacity + i], 1);
    if (blockIdx.x > 0) return;
    for (int r = threadIdx.x; r < kRound; r += kThreads)
      add(search.lo + (typename Space::Key(r) << kLowBits<Space>), search.round[r]);
    if (threadIdx.x == 0) add(search.peak, search.at_peak);
  }
};

template <class Space>
struct Tensors {
  Scope scope;
  bool drop;

  static constexpr bool kFallback = true;

  template <class Add>
  __device__ void for_each(const Search<typename Space::Key>&, int task, const Add& add) const {
    for (int64_t c = blockIdx.x; c < scope.num_chunks; c += gridDim.x) {
      const Chunk chunk = scope.chunk(c);
      const Part& part = scope.parts[chunk.part];
      for (int i = threadIdx.x; i < chunk.count; i += kThreads)
        add(key_at<Space>(part, scope.expert(chunk.part, task), chunk.begin + i, drop), 1);
    }
  }
};

template <class Key>
struct Outcome {
  int64_t numel;
  Dtype dtype;
  Limit<Key>* limits;
};

// One step of the descent: a histogram of the next bits, and the last block of an expert picks the bin.
template <class Space, class Source>
__global__ void __launch_bounds__(kThreads)
    descend(Source source, int step, int64_t capacity, Search<typename Space::Key>* searches, Count* histograms,
            Outcome<typename Space::Limit> outcome) {
  using Key = typename Space::Key;
  using Unsigned = std::make_unsigned_t<Key>;
  constexpr int kOwn = kBins / kThreads;
  __shared__ unsigned bins[kBins];
  __shared__ Search<Key> search;
  __shared__ Count sums[32];
  __shared__ bool is_last;
  const int task = blockIdx.y;
  if (threadIdx.x == 0) {
    search = searches[task];
    if (Source::kFallback && step == 0) {
      search.first = 0;
      search.width = Space::kBits;
      search.rank = search.keep;
    } else if (step == 0) {
      begin<Space>(search, capacity);
    }
  }
  __syncthreads();
  if (!search.is_open(outcome.numel) || (step > 0 && search.width == 0)) return;
  if (!Source::kFallback && search.missed) {
    if (threadIdx.x == 0 && blockIdx.x == 0) searches[task].missed = true;
    return;
  }
  if (Source::kFallback && !search.missed) return;

  const int shift = search.width > kRadixBits ? search.width - kRadixBits : 0;
  const Key first = search.first;
  const Unsigned last = (Unsigned(1) << search.width) - 1;
  Count* const histogram = histograms + int64_t(task) * kBins;
  for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  source.for_each(search, task, [&](Key key, Count weight) {
    const Unsigned at = Unsigned(key) - Unsigned(first);
    if (weight == 0 || at > last) return;
    if (weight == 1)
      atomicAdd(&bins[at >> shift], 1u);
    else
      atomicAdd(&histogram[at >> shift], weight);
  });
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads)
    if (bins[b]) atomicAdd(&histogram[b], Count(bins[b]));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(&searches[task].finished_blocks, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  // Thread 0 holds the largest bins.
  Count* const mine = histogram + (kBins - (threadIdx.x + 1) * kOwn);
  Count total = 0;
  for (int b = 0; b < kOwn; ++b) total += __ldcg(&mine[b]);
  const Count through = inclusive_scan(total, sums), before = through - total;
  if (Count(search.rank) > before && Count(search.rank) <= through) {
    Count left = Count(search.rank) - before;
    int b = kOwn - 1;
    for (; left > __ldcg(&mine[b]); --b) left -= __ldcg(&mine[b]);
    Search<Key>& found = searches[task];
    found.first = first + (Key(int(kBins - (threadIdx.x + 1) * kOwn) + b) << shift);
    found.width = shift;
    found.rank = int64_t(left);
    found.missed = search.missed;
    found.finished_blocks = 0;
    if (shift == 0) {
      found.budget = int64_t(left);
      found.ties = int64_t(__ldcg(&mine[b]));
      outcome.limits[task] = {limit_of<Space>(found.first, outcome.dtype), outcome.numel};
    }
  }
  __syncthreads();
  for (int b = 0; b < kOwn; ++b) mine[b] = 0;
}

}  // namespace
}  // namespace cuda
}  // namespace sk
