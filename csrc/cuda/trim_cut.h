// Where some of an expert's ties stay and some go: the flat index behind the last that stays.
#pragma once
#include "trim_search.h"

namespace sk {
namespace cuda {
namespace {

// The ties of every chunk, where some of them stay and some go.
template <class Space>
__global__ void __launch_bounds__(kThreads)
    count_ties(Scope scope, const Search<typename Space::Key>* searches, unsigned* ties, bool drop) {
  const int task = blockIdx.y;
  const Search<typename Space::Key>& search = searches[task];
  if (!search.is_open(scope.numel) || search.budget == search.ties) return;
  const auto threshold = search.first;
  for (int64_t c = blockIdx.x; c < scope.num_chunks; c += gridDim.x) {
    const Chunk chunk = scope.chunk(c);
    const Part& part = scope.parts[chunk.part];
    const void* const expert = scope.expert(chunk.part, task);
    unsigned mine = 0;
    with_stored<Space>(part.dtype, [&](auto s) {
      using S = decltype(s);
      const auto is_tie = [&](int i) {
        return key_at<Space, S>(part.base, expert, chunk.begin + i, drop) == threshold;
      };
      for (int i = threadIdx.x; i < chunk.count; i += kThreads) mine += is_tie(i);
    });
    mine = __reduce_add_sync(kAll, mine);
    if (threadIdx.x % 32 == 0 && mine) atomicAdd(&ties[task * scope.num_chunks + c], mine);
  }
}

// One block per expert: the flat index behind the last tie that stays.
template <class Space>
__global__ void __launch_bounds__(kThreads)
    find_cut(Scope scope, const Search<typename Space::Key>* searches, const unsigned* ties,
             Limit<typename Space::Limit>* limits, bool drop) {
  __shared__ Count sums[32];
  __shared__ int64_t found;
  const int task = blockIdx.x;
  const Search<typename Space::Key>& search = searches[task];
  if (!search.is_open(scope.numel) || search.budget == search.ties) return;
  // The first place where `count` summed over [0, place] reaches the budget; the sum before it is taken off.
  Count budget = Count(search.budget);
  const auto place_of_budget = [&](int64_t places, const auto& count) {
    for (int64_t from = 0; from < places; from += kThreads) {
      const int64_t place = from + threadIdx.x;
      const Count here = place < places ? count(place) : 0;
      const Count through = inclusive_scan(here, sums), all = sums[kWarps - 1];
      if (all < budget) {
        budget -= all;
        continue;
      }
      if (through >= budget && through - here < budget) {
        found = place;
        sums[31] = through - here;
      }
      __syncthreads();
      budget -= sums[31];
      return found;
    }
    return places;
  };
  const int64_t c = place_of_budget(scope.num_chunks, [&](int64_t i) { return ties[task * scope.num_chunks + i]; });
  const Chunk chunk = scope.chunk(c);
  const Part& part = scope.parts[chunk.part];
  __syncthreads();
  const int64_t i = place_of_budget(chunk.count, [&](int64_t i) {
    return key_at<Space>(part, scope.expert(chunk.part, task), chunk.begin + i, drop) == search.first;
  });
  if (threadIdx.x == 0) limits[task].cut = part.offset + chunk.begin + i + 1;
}

}  // namespace
}  // namespace cuda
}  // namespace sk
