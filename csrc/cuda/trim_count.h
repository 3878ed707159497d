// The one read of every tensor: counts what lies above a bracket and collects what lies inside.
#pragma once
#include <type_traits>

#include "trim_search.h"

namespace sk {
namespace cuda {
namespace {

constexpr int kGroup = 16;  // experts a block counts while it holds a chunk of the base
constexpr int kMine = 8;    // elements of a piece in each thread
constexpr int kPiece = kThreads * kMine;
static_assert(kChunk % kPiece == 0);
constexpr int kStageBytes = 256;  // collected keys that wait for company, per warp and expert

// A piece of one tensor: packs of 16 bytes when it is whole and aligned, else at most `count` elements.
template <class S, bool whole>
__device__ void load_piece(const void* p, int64_t begin, int count, S (&values)[kMine]) {
  if constexpr (whole) {
    constexpr int V = kPack<S>;
#pragma unroll
    for (int j = 0; j < kMine / V; ++j) {
      const Pack<S, V> pack = load<S, V>(p, begin + (j * kThreads + threadIdx.x) * V);
#pragma unroll
      for (int k = 0; k < V; ++k) values[j * V + k] = pack.v[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      const int i = j * kThreads + threadIdx.x;
      values[j] = i < count ? static_cast<const S*>(p)[begin + i] : S();
    }
  }
}

// Keys on their way to the candidates of their expert.
template <class Key>
struct Stage {
  static constexpr int kSize = kStageBytes / int(sizeof(Key));
  Key keys[kSize];
  int size;

  // All lanes of the warp together.
  __device__ void flush(Search<Key>& search, Key* candidates, int64_t capacity) {
    const int lane = threadIdx.x % 32;
    const int waiting = size;
    Count slot = 0;
    if (lane == 0) slot = atomicAdd(&search.collected, Count(waiting));
    slot = __shfl_sync(kAll, slot, 0);
    for (int i = lane; i < waiting; i += 32)
      if (int64_t(slot) + i < capacity) candidates[slot + i] = keys[i];
    __syncwarp();
    if (lane == 0) size = 0;
    __syncwarp();
  }

  // `lanes`: those that bring a key.
  __device__ void add(unsigned lanes, Key key, Search<Key>& search, Key* candidates, int64_t capacity) {
    const int lane = threadIdx.x % 32, count = __popc(lanes);
    if (size + count > kSize) flush(search, candidates, capacity);
    if (lanes >> lane & 1) keys[size + __popc(lanes & ((1u << lane) - 1))] = key;
    __syncwarp();
    if (lane == 0) size += count;
    __syncwarp();
  }
};

template <class Key>
struct Tally {
  Key lo[kGroup], hi[kGroup], peak[kGroup];
  Count above[kGroup], at_peak[kGroup];
  unsigned round[kGroup][kRound];
  Stage<Key> stages[kGroup][kWarps];
};

template <class Space, class S, bool whole>
__device__ bool count_piece(const Scope& scope, const Chunk& piece, int first_task, int tasks,
                            Search<typename Space::Key>* searches, typename Space::Key* candidates, int64_t capacity,
                            bool drop, Tally<typename Space::Key>& tally) {
  using Key = typename Space::Key;
  using Unsigned = std::make_unsigned_t<Key>;
  constexpr Key kLowMask = (Key(1) << kLowBits<Space>)-1;
  const Part& part = scope.parts[piece.part];
  const bool has_base = part.base != nullptr;
  constexpr Key infinity = infinity_of<Space, S>();
  const int warp = threadIdx.x / 32;
  bool nonfinite = false;
  S base[kMine], expert[kMine];
  if (has_base) load_piece<S, whole>(part.base, piece.begin, piece.count, base);
  for (int g = 0; g < tasks; ++g) {
    load_piece<S, whole>(scope.expert(piece.part, first_task + g), piece.begin, piece.count, expert);
    const Key lo = tally.lo[g], hi = tally.hi[g], peak = tally.peak[g];
    unsigned counts = 0;  // above, and at the peak in the upper half
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      Key key = key_of<Space>(has_base ? task_vector(expert[j], base[j], true) : expert[j]);
      if (key >= infinity) {
        nonfinite |= whole || int(j * kThreads + threadIdx.x) < piece.count;
        if (drop) key = 0;
      }
      if (!whole && int(j * kThreads + threadIdx.x) >= piece.count) key = -1;
      counts += (key > hi) + (key == peak ? 0x10000 : 0);
      bool collect = Unsigned(key - lo) <= Unsigned(hi - lo) && key != peak;
      if (collect && (key & kLowMask) == 0) {
        const Key round = (key >> kLowBits<Space>)-(lo >> kLowBits<Space>);
        if (round < kRound) {
          atomicAdd(&tally.round[g][round], 1u);
          collect = false;
        }
      }
      const unsigned lanes = __ballot_sync(kAll, collect);
      if (lanes) tally.stages[g][warp].add(lanes, key, searches[g], candidates + g * capacity, capacity);
    }
    counts = __reduce_add_sync(kAll, counts);
    if (threadIdx.x % 32 == 0) {
      atomicAdd(&tally.above[g], Count(counts & 0xFFFF));
      atomicAdd(&tally.at_peak[g], Count(counts >> 16));
    }
  }
  return nonfinite;
}

// One read of every tensor. A block takes chunks of the base and, beside each, the chunk of every expert of its group.
template <class Space>
__global__ void __launch_bounds__(kThreads, 2)
    count(Scope scope, Search<typename Space::Key>* searches, typename Space::Key* candidates, int64_t capacity,
          bool drop, int* nonfinite) {
  using Key = typename Space::Key;
  __shared__ Tally<Key> tally;
  const int first_task = blockIdx.y * kGroup;
  const int tasks = scope.num_tasks - first_task < kGroup ? scope.num_tasks - first_task : kGroup;
  searches += first_task;
  candidates += first_task * capacity;
  for (int i = threadIdx.x; i < kGroup * kRound; i += kThreads) tally.round[i / kRound][i % kRound] = 0;
  for (int i = threadIdx.x; i < kGroup * kWarps; i += kThreads) tally.stages[i / kWarps][i % kWarps].size = 0;
  for (int g = threadIdx.x; g < tasks; g += kThreads) {
    tally.lo[g] = searches[g].lo;
    tally.hi[g] = searches[g].hi;
    tally.peak[g] = searches[g].peak;
    tally.above[g] = tally.at_peak[g] = 0;
  }
  __syncthreads();
  bool bad = false;
  for (int64_t c = blockIdx.x; c < scope.num_chunks; c += gridDim.x) {
    const Chunk chunk = scope.chunk(c);
    const Part& part = scope.parts[chunk.part];
    for (int at = 0; at < chunk.count; at += kPiece) {
      const int left = chunk.count - at;
      const Chunk piece = {chunk.part, chunk.begin + at, left < kPiece ? left : kPiece};
      const bool whole = part.aligned && piece.count == kPiece;
      with_stored<Space>(part.dtype, [&](auto s) {
        using S = decltype(s);
        if (whole)
          bad |=
              count_piece<Space, S, true>(scope, piece, first_task, tasks, searches, candidates, capacity, drop, tally);
        else
          bad |= count_piece<Space, S, false>(scope, piece, first_task, tasks, searches, candidates, capacity, drop,
                                              tally);
      });
    }
  }
  if (bad && nonfinite) *nonfinite = 1;
  __syncthreads();
  for (int g = 0; g < tasks; ++g)
    tally.stages[g][threadIdx.x / 32].flush(searches[g], candidates + g * capacity, capacity);
  for (int i = threadIdx.x; i < tasks * kRound; i += kThreads) {
    const unsigned n = tally.round[i / kRound][i % kRound];
    if (n) atomicAdd(&searches[i / kRound].round[i % kRound], Count(n));
  }
  for (int g = threadIdx.x; g < tasks; g += kThreads) {
    atomicAdd(&searches[g].above, tally.above[g]);
    atomicAdd(&searches[g].at_peak, tally.at_peak[g]);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace sk
