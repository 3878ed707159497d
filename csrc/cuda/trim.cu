#include "trim.h"

#include <atomic>
#include <cmath>

#include "values.h"

namespace sk {
namespace cuda {
namespace {

constexpr int64_t kSamples = 1 << 16;  // of each expert: the bracket holds its threshold and 1 or 2 % of the rest
constexpr int kPrefixBits = 15;
constexpr int kPrefixes = 1 << kPrefixBits;
constexpr int kRadixBits = 11;
constexpr int kBins = 1 << kRadixBits;
constexpr int kScan = 1024;  // threads that look through kPrefixes bins

constexpr int kGroup = 16;  // experts a block counts while it holds a chunk of the base
constexpr int kRound = 64;  // round keys of a bracket that are counted, not collected
constexpr int kWarps = kThreads / 32;
constexpr int kMine = 8;  // elements of a piece in each thread
constexpr int kPiece = kThreads * kMine;
static_assert(kChunk % kPiece == 0);
constexpr int kStageBytes = 256;  // collected keys that wait for company, per warp and expert
constexpr unsigned kAll = 0xFFFFFFFF;

std::atomic<bool> forced_descent{false};

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

__device__ inline unsigned scramble(unsigned x) {
  x = (x ^ (x >> 16)) * 0x7FEB352D;
  x = (x ^ (x >> 15)) * 0x846CA68B;
  return x ^ (x >> 16);
}

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

template <class Space>
const Limit<typename Space::Limit>* trim_in(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                                            const TrimOptions& options, int* nonfinite) {
  using Key = typename Space::Key;
  const int tasks = scope.num_tasks;
  std::vector<Search<Key>> blank(size_t(tasks), Search<Key>{});
  for (int t = 0; t < tasks; ++t) blank[size_t(t)].keep = options.keep[size_t(t)];
  Search<Key>* const searches = device.upload(blank);
  auto* const limits = device.array<Limit<typename Space::Limit>>(tasks);
  unsigned* const samples = device.zeros<unsigned>(int64_t(tasks) * kPrefixes);
  // Twice what a bracket holds; beyond that the tensors are read again.
  const int64_t capacity = std::min(scope.numel, kSamples + scope.numel / 32);
  Key* const candidates = device.array<Key>(tasks * capacity);
  Count* const histograms = device.zeros<Count>(int64_t(tasks) * kBins);
  const unsigned all = unsigned(tasks), groups = unsigned((tasks + kGroup - 1) / kGroup);
  const unsigned surveys = unsigned((std::min(scope.numel, kSamples) + kThreads - 1) / kThreads);
  const dim3 readers(device.blocks(scope.num_chunks, 4), groups);

  if (surveys > 0)
    SK_LAUNCH(survey<Space>, dim3(surveys, all), kThreads, 0, device.stream, scope, searches, samples, options.drop);
  SK_LAUNCH(set_bracket<Space>, all, kScan, 0, device.stream, scope, searches, limits, samples, forced_descent.load());
  SK_LAUNCH(count<Space>, readers, kThreads, 0, device.stream, scope, searches, candidates, capacity, options.drop,
            nonfinite);
  const Outcome<typename Space::Limit> outcome{scope.numel, tensors.parts()[0].dtype, limits};
  const dim3 sorters(device.blocks(capacity / kChunk, 1), all);
  for (int step = 0; step * kRadixBits < Space::kBits; ++step)
    SK_LAUNCH((descend<Space, Candidates<Space>>), sorters, kThreads, 0, device.stream,
              (Candidates<Space>{candidates, capacity}), step, capacity, searches, histograms, outcome);
  const dim3 rereaders(device.blocks(scope.num_chunks, 8), all);
  for (int step = 0; step * kRadixBits < Space::kBits; ++step)
    SK_LAUNCH((descend<Space, Tensors<Space>>), rereaders, kThreads, 0, device.stream,
              (Tensors<Space>{scope, options.drop}), step, capacity, searches, histograms, outcome);
  if (!options.all_ties) {
    unsigned* const ties = device.zeros<unsigned>(tasks * scope.num_chunks);
    SK_LAUNCH(count_ties<Space>, rereaders, kThreads, 0, device.stream, scope, searches, ties, options.drop);
    SK_LAUNCH(find_cut<Space>, all, kThreads, 0, device.stream, scope, searches, ties, limits, options.drop);
  }
  check(cudaGetLastError());
  return limits;
}

__global__ void count_nonfinite_values(Scope scope, Count* counts) {
  const int columns = 1 + 2 * scope.num_tasks;
  for (int64_t c = blockIdx.x; c < scope.num_chunks; c += gridDim.x) {
    const Chunk chunk = scope.chunk(c);
    const Part& part = scope.parts[chunk.part];
    const auto count_into = [&](int column, const void* base, const void* expert) {
      Part compared = part;
      compared.base = base;
      Count mine = 0;
      for (int i = threadIdx.x; i < chunk.count; i += kThreads)
        mine += part.dtype == Dtype::f64
                    ? key_at<Double>(compared, expert, chunk.begin + i, false) >= kInfinityKey<int64_t>
                    : key_at<Single>(compared, expert, chunk.begin + i, false) >= kInfinityKey<int32_t>;
      if (mine) atomicAdd(&counts[int64_t(chunk.part) * columns + column], mine);
    };
    if (part.base) count_into(0, nullptr, part.base);
    for (int t = 0; t < scope.num_tasks; ++t) {
      count_into(1 + 2 * t, nullptr, scope.expert(chunk.part, t));
      if (part.base) count_into(2 + 2 * t, part.base, scope.expert(chunk.part, t));
    }
  }
}

template <class Key>
__global__ void split_limits(const Limit<Key>* limits, int num_tasks, Key* thresholds, int64_t* cuts) {
  for (int t = threadIdx.x; t < num_tasks; t += kThreads) {
    thresholds[t] = limits[t].threshold;
    cuts[t] = limits[t].cut;
  }
}

constexpr size_t kParcel = 4000;  // an argument list has 4096 bytes

struct Parcel {
  unsigned char bytes[kParcel];
};

__global__ void deliver(unsigned char* data, const __grid_constant__ Parcel parcel, int size) {
  for (int i = threadIdx.x; i < size; i += kThreads) data[i] = parcel.bytes[i];
}

}  // namespace

void Device::copy(void* data, const void* bytes, size_t count) const {
  for (size_t at = 0; at < count; at += kParcel) {
    Parcel parcel;
    const size_t size = std::min(kParcel, count - at);
    memcpy(parcel.bytes, static_cast<const char*>(bytes) + at, size);
    SK_LAUNCH(deliver, 1, kThreads, 0, stream, static_cast<unsigned char*>(data) + at, parcel, int(size));
  }
  check(cudaGetLastError());
}

template <>
const Limit<int32_t>* trim(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                           const TrimOptions& options, int* nonfinite) {
  return tensors.is_narrow() ? trim_in<Narrow>(device, tensors, scope, options, nonfinite)
                             : trim_in<Single>(device, tensors, scope, options, nonfinite);
}

template <>
const Limit<int64_t>* trim(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                           const TrimOptions& options, int* nonfinite) {
  return trim_in<Double>(device, tensors, scope, options, nonfinite);
}

template <class Key>
void take_apart(const Device& device, const Limit<Key>* limits, int num_tasks, Key* thresholds, int64_t* cuts) {
  SK_LAUNCH(split_limits<Key>, 1, kThreads, 0, device.stream, limits, num_tasks, thresholds, cuts);
  check(cudaGetLastError());
}
template void take_apart(const Device&, const Limit<int32_t>*, int, int32_t*, int64_t*);
template void take_apart(const Device&, const Limit<int64_t>*, int, int64_t*, int64_t*);

void force_descent(bool on) { forced_descent = on; }

void look_for_nonfinite(const Device& device, const ScopeBuilder& tensors, const Scope& scope, int* nonfinite) {
  const auto look = [&](auto space) {
    using Space = decltype(space);
    using Key = typename Space::Key;
    Search<Key> nothing{};
    nothing.lo = nothing.hi = nothing.peak = kMaxKey<Key>;
    Search<Key>* const searches = device.upload(std::vector<Search<Key>>(size_t(scope.num_tasks), nothing));
    const dim3 readers(device.blocks(scope.num_chunks, 4), unsigned((scope.num_tasks + kGroup - 1) / kGroup));
    SK_LAUNCH(count<Space>, readers, kThreads, 0, device.stream, scope, searches, static_cast<Key*>(nullptr),
              int64_t(0), false, nonfinite);
  };
  if (tensors.is_wide())
    look(Double());
  else if (tensors.is_narrow())
    look(Narrow());
  else
    look(Single());
  check(cudaGetLastError());
}

const Count* count_nonfinite(const Device& device, const Scope& scope) {
  Count* const counts = device.zeros<Count>(int64_t(scope.num_parts) * (1 + 2 * scope.num_tasks));
  SK_LAUNCH(count_nonfinite_values, device.blocks(scope.num_chunks, 8), kThreads, 0, device.stream, scope, counts);
  check(cudaGetLastError());
  return counts;
}

}  // namespace cuda
}  // namespace sk
