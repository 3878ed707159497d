#include "trim.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <tuple>

#include "inputs.h"
#include "rounding.h"
#include "select.h"
#include "trim_kernel.h"

namespace sk {
namespace {

constexpr int64_t kDirect = 1 << 10;        // up to here every key is a candidate: no sample is worth its time
constexpr int64_t kWorthAThread = 1 << 12;  // elements from which the experts are shared out among threads
constexpr int64_t kCluster = 16;            // neighbouring elements per sampled place: one cache line of float32
constexpr int64_t kPlacesMapped = 1 << 10;  // sampled between two times that pages are given back: a fault maps 64 KiB
constexpr int64_t kMaxInside = 1 << 20;     // candidates one thread stores, beyond a share of its elements
constexpr int64_t kMostInside = 48 << 20;   // candidates of a call: a scope may be larger than the memory

std::atomic<bool> forced_histogram{false};

// Runs body(first, last) over experts. On a busy machine waiting for a second thread costs more than a small tensor.
template <class Body>
void for_each_expert(const Scope& scope, int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, scope.numel > kWorthAThread ? 1 : count, body);
}

// Keys appended chunk by chunk, never initialised.
template <class Key>
struct KeyBuffer {
  std::unique_ptr<Key[]> data;
  int64_t size = 0, capacity = 0;

  Key* room(int64_t count) {
    if (size + count > capacity) {
      capacity = std::max(capacity + capacity / 2, size + count);
      std::unique_ptr<Key[]> larger(new Key[capacity]);
      std::copy_n(data.get(), size, larger.get());
      data = std::move(larger);
    }
    return data.get() + size;
  }
};

struct ChunkTies {
  uint16_t at_hi, inside, at_lo;
};

// What one read says of some experts; slot s of everything belongs to tasks[s].
template <class Key>
struct Tally {
  struct Range {
    int64_t first, last;                 // chunks
    std::vector<KeyBuffer<Key>> inside;  // [slots]
    std::vector<char> overflowed;        // [slots]
  };
  std::vector<int64_t> tasks;
  std::vector<Bracket<Key>> brackets;
  std::vector<Counts<Key>> totals;
  std::vector<Range> ranges;    // in chunk order
  std::vector<ChunkTies> ties;  // [num_chunks, slots], empty unless wanted
};

template <class Key>
Tally<Key> count(const Scope& scope, std::vector<int64_t> tasks, std::vector<Bracket<Key>> brackets, bool drop,
                 bool want_ties) {
  const TrimKernels& kernels = SK_KERNELS(trim_kernels);
  const size_t slots = tasks.size();
  Tally<Key> tally{std::move(tasks), std::move(brackets), std::vector<Counts<Key>>(slots), {}, {}};
  if (want_ties) tally.ties.resize(size_t(scope.num_chunks) * slots);
  std::mutex mutex;
  scope.parallel([&](int64_t first, int64_t last) {
    typename Tally<Key>::Range range{first, last, std::vector<KeyBuffer<Key>>(slots), std::vector<char>(slots)};
    std::vector<Counts<Key>> totals(slots);
    const int64_t most = std::min(
        kMaxInside / int64_t(slots) + (last - first) * (kChunk / 16),
        kChunk + int64_t(double(kMostInside) / double(slots) * double(last - first) / double(scope.num_chunks)));
    for (int64_t c = first; c < last; ++c) {
      const Chunk chunk = scope.chunk(c);
      const TrimKernel<Key>& kernel = kernels.get<Key>(chunk.part.dtype);
      const char* base = chunk.part.base_at(chunk.begin);
      for (size_t s = 0; s < slots; ++s) {
        KeyBuffer<Key>& inside = range.inside[s];
        const Counts<Key> n = kernel.count(base, chunk.part.expert_at(tally.tasks[s], chunk.begin), chunk.count,
                                           tally.brackets[s], scope.mixed, drop, inside.room(chunk.count + kSlack));
        inside.size += n.inside;
        if (inside.size > most) {
          range.overflowed[s] = true;
          inside.size = 0;
        }
        totals[s] += n;
        if (want_ties) tally.ties[c * slots + s] = {uint16_t(n.at_hi), uint16_t(n.inside), uint16_t(n.at_lo)};
      }
      scope.report(chunk);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t s = 0; s < slots; ++s) tally.totals[s] += totals[s];
    tally.ranges.push_back(std::move(range));
  });
  std::sort(tally.ranges.begin(), tally.ranges.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return tally;
}

// In one dtype the pass reads unrounded keys; boundaries then fall between stored values.
template <class Key>
Interval<Key> ties_of(const Scope& scope, Key key) {
  return scope.mixed ? Interval<Key>{key, key} : same_when_rounded(key, scope.parts[0].dtype);
}
template <class Key>
Key stored_key(const Scope& scope, Key key) {
  return scope.mixed ? key : round_key(key, scope.parts[0].dtype);
}

// All keys from value `lo` to value `hi`, their copies stored or counted.
template <class Key>
Bracket<Key> bracket_of(const Scope& scope, Key lo, Key hi, bool counts_ends) {
  const Interval<Key> low = ties_of(scope, lo), high = ties_of(scope, hi);
  if (!counts_ends) return {low.first - 1, low.first - 1, high.last, high.last};
  if (lo == hi) return {low.first - 1, low.first - 1, low.first - 1, low.last};
  return {low.first - 1, low.last, high.first - 1, high.last};
}

// Places spread evenly over the scope, each at a pseudo-random point of its stride.
template <class Key>
std::vector<Bracket<Key>> brackets(const Scope& scope, const std::vector<int64_t>& tasks,
                                   const std::vector<int64_t>& rank, bool drop) {
  if (scope.numel <= kDirect) return std::vector<Bracket<Key>>(tasks.size(), {-1, -1, kMaxKey<Key>, kMaxKey<Key>});
  const TrimKernels& kernels = SK_KERNELS(trim_kernels);
  // The sample costs its size, the candidates cost numel / sqrt(size): the sum is least near numel^(2/3).
  const int64_t places = int64_t(std::cbrt(double(scope.numel) * double(scope.numel))) / kCluster;
  std::vector<int64_t> position(places);
  uint64_t random = 0x9E3779B97F4A7C15;
  for (int64_t j = 0; j < places; ++j) {
    random = random * 6364136223846793005 + 1442695040888963407;
    const double stride = double(scope.numel) / double(places);
    position[j] = std::min(scope.numel - 1, int64_t((double(j) + double(random >> 11) * 0x1p-53) * stride));
  }
  std::vector<Bracket<Key>> found(tasks.size());
  for_each_expert(scope, int64_t(tasks.size()), [&](int64_t first, int64_t last) {
    std::vector<Key> sample;
    std::vector<int64_t> ends(places);
    for (int64_t s = first; s < last; ++s) {
      sample.resize(places * kCluster + kSlack);
      int64_t size = 0;
      for (int64_t j = 0; j < places; ++j) {
        if (j % kPlacesMapped == kPlacesMapped - 1) give_back_mapped();
        const Part& part = scope.part_of(position[j]);
        const int64_t begin = std::max<int64_t>(0, std::min(position[j] - part.offset, part.numel - kCluster));
        const int64_t n = std::min(kCluster, part.numel - begin);
        kernels.get<Key>(part.dtype)
            .keys(part.base_at(begin), part.expert_at(tasks[s], begin), n, drop, sample.data() + size);
        ends[j] = size += n;
      }
      sample.resize(size);
      const SampledRange<Key> range = sampled_range(sample, ends, rank[s], scope.numel);
      found[s] = bracket_of(scope, range.lo, range.hi, range.crowded_ends);
    }
  });
  return found;
}

// The exact thresholds by histograms of ever fewer bits: three reads for float32, six for float64. Needs no luck and no
// candidates.
template <class Key>
std::vector<Key> histogram_thresholds(const Scope& scope, const std::vector<int64_t>& tasks, std::vector<int64_t> rank,
                                      bool drop) {
  const TrimKernels& kernels = SK_KERNELS(trim_kernels);
  const size_t slots = tasks.size();
  std::vector<Radix<Key>> range(slots, Radix<Key>(0, kMaxKey<Key>));
  const auto open = [](const Radix<Key>& r) { return r.lo != r.hi; };
  while (std::any_of(range.begin(), range.end(), open)) {
    std::vector<std::vector<int64_t>> histogram(slots, std::vector<int64_t>(size_t(1) << kRadixBits));
    std::mutex mutex;
    scope.parallel([&](int64_t first, int64_t last) {
      std::vector<std::vector<int64_t>> mine(slots, std::vector<int64_t>(size_t(1) << kRadixBits));
      std::vector<Key> keys(kChunk + kSlack);
      for (int64_t c = first; c < last; ++c) {
        const Chunk chunk = scope.chunk(c);
        for (size_t s = 0; s < slots; ++s) {
          kernels.get<Key>(chunk.part.dtype)
              .keys(chunk.part.base_at(chunk.begin), chunk.part.expert_at(tasks[s], chunk.begin), chunk.count, drop,
                    keys.data());
          for (int64_t i = 0; i < chunk.count; ++i)
            if (range[s].holds(keys[i])) ++mine[s][range[s].bin(keys[i])];
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t s = 0; s < slots; ++s)
        for (size_t b = 0; b < mine[s].size(); ++b) histogram[s][b] += mine[s][b];
    });
    for (size_t s = 0; s < slots; ++s)
      if (open(range[s])) range[s] = range[s].descend(histogram[s].data(), rank[s]);
  }
  std::vector<Key> thresholds;
  for (const auto& r : range) thresholds.push_back(r.lo);
  return thresholds;
}

// The keep-th largest stored key of slot s, if the bracket holds it and its candidates were kept.
template <class Key>
bool select(const Scope& scope, const Tally<Key>& tally, size_t s, int64_t keep, Key* threshold) {
  const Counts<Key>& n = tally.totals[s];
  const Bracket<Key>& bracket = tally.brackets[s];
  int64_t rank = keep - n.above;
  if (rank <= 0) return false;
  if (rank <= n.at_hi) return *threshold = stored_key(scope, bracket.top), true;
  rank -= n.at_hi;
  if (rank > n.inside) {
    *threshold = stored_key(scope, bracket.lo);
    return rank - n.inside <= n.at_lo;
  }
  std::vector<Span<Key>> candidates;
  for (const auto& range : tally.ranges) {
    if (range.overflowed[s]) return false;
    candidates.push_back({range.inside[s].data.get(), range.inside[s].size});
  }
  const OrderStatistics<Key> order(std::move(candidates), bracket.lo + 1, bracket.hi);
  *threshold = stored_key(scope, order.kth_largest(rank));
  return true;
}

// The flat index before which the ties of slot s are kept, so that exactly `keep` entries stay. From the smallest on:
// before which they belong to the smallest entries, of which there are as many as leave keep - 1.
template <class Key>
int64_t cut_of(const Scope& scope, const Tally<Key>& tally, size_t s, int64_t keep, bool from_smallest, Key threshold,
               bool drop) {
  const Bracket<Key>& bracket = tally.brackets[s];
  const Counts<Key>& total = tally.totals[s];
  const Interval<Key> ties = ties_of(scope, threshold);
  const bool at_hi = ties.last == bracket.top && bracket.top != bracket.hi;
  const bool at_lo = ties.last == bracket.lo && bracket.lo != bracket.bottom;
  int64_t budget = keep - total.above - (at_hi ? 0 : total.at_hi) - (at_lo ? total.inside : 0);
  if (!at_hi && !at_lo)
    for (const auto& range : tally.ranges) {
      const Key* stored = range.inside[s].data.get();
      budget -= std::count_if(stored, stored + range.inside[s].size, [&](Key key) { return key > ties.last; });
    }
  std::vector<int64_t> here;  // ties of every chunk
  for (const auto& range : tally.ranges) {
    const Key* stored = range.inside[s].data.get();
    for (int64_t c = range.first; c < range.last; ++c) {
      const ChunkTies& n = tally.ties[size_t(c) * tally.tasks.size() + s];
      here.push_back(at_hi ? n.at_hi : n.at_lo);
      if (at_hi || at_lo) continue;
      here.back() = std::count_if(stored, stored + n.inside, [&](Key key) { return ties.holds(key); });
      stored += n.inside;
    }
  }
  if (from_smallest) budget = std::accumulate(here.begin(), here.end(), int64_t(1)) - budget;
  for (size_t c = 0; c < here.size(); ++c) {
    if (here[c] < budget) {
      budget -= here[c];
      continue;
    }
    const Chunk chunk = scope.chunk(int64_t(c));
    std::vector<Key> keys(kChunk + kSlack);
    SK_KERNELS(trim_kernels)
        .get<Key>(chunk.part.dtype)
        .keys(chunk.part.base_at(chunk.begin), chunk.part.expert_at(tally.tasks[s], chunk.begin), chunk.count, drop,
              keys.data());
    int64_t i = 0;
    for (; budget > 0 && i < chunk.count; ++i) budget -= keys[size_t(i)] == threshold;
    return chunk.part.offset + chunk.begin + i;
  }
  return scope.numel;
}

template <class Key>
bool is_finite(const Scope& scope, const Tally<Key>& tally) {
  return std::all_of(tally.totals.begin(), tally.totals.end(),
                     [&](const Counts<Key>& n) { return stored_key(scope, n.largest) < kInfinityKey<Key>; });
}

std::string where(const std::vector<std::string>& names, size_t part) {
  return part < names.size() ? " in tensor '" + names[part] + "'" : "";
}

}  // namespace

void force_histogram(bool on) { forced_histogram = on; }

template <class Key>
void check_finite(const Scope& scope, const std::vector<std::string>& names) {
  std::vector<int64_t> tasks(scope.num_tasks);
  std::iota(tasks.begin(), tasks.end(), 0);
  const Key most = kMaxKey<Key>;
  const std::vector<Bracket<Key>> nothing(tasks.size(), {most, most, most, most});
  const Tally<Key> tally = count(scope, tasks, nothing, /*drop=*/false, /*want_ties=*/false);
  if (is_finite(scope, tally)) return;

  const auto nonfinite = [&](const Part& part, const char* base, const char* tensor) {
    int64_t found = 0;
    std::vector<Key> keys(kChunk + kSlack);
    for (int64_t i = 0; i < part.numel; i += kChunk) {
      const int64_t n = std::min(kChunk, part.numel - i), at = i * size_of(part.dtype);
      SK_KERNELS(trim_kernels)
          .get<Key>(part.dtype)
          .keys(base ? base + at : nullptr, tensor + at, n, false, keys.data());
      found += std::count_if(keys.begin(), keys.begin() + n, [](Key key) { return key >= kInfinityKey<Key>; });
    }
    return found;
  };
  for (size_t p = 0; p < scope.parts.size(); ++p) {
    const Part& part = scope.parts[p];
    if (part.base) {
      const int64_t n = nonfinite(part, nullptr, part.base);
      require(n == 0, "base must be finite, got ", n, " NaN or infinite values", where(names, p));
    }
    for (int64_t t = 0; t < scope.num_tasks; ++t) {
      int64_t n = nonfinite(part, nullptr, part.experts[t]);
      require(n == 0, "experts[", t, "] must be finite, got ", n, " NaN or infinite values", where(names, p));
      n = nonfinite(part, part.base, part.experts[t]);
      require(n == 0, "experts[", t, "] - base must be finite, got ", n, " overflows", where(names, p));
    }
  }
}

// One limit to find: the rank-th largest key of an expert. Rank 0 keeps nothing; one above the number of entries keeps
// all of them, and neither is looked for.
struct Place {
  int64_t task, rank;
  bool from_smallest = false;  // the cut ends the ties of the smallest entries
};

template <class Key>
std::vector<Limit<Key>> limits_at(const Scope& scope, const std::vector<Place>& places, bool all_ties,
                                  NonFinite nonfinite, const std::vector<std::string>& names) {
  const bool drop = nonfinite == NonFinite::drop;
  std::vector<Limit<Key>> limits(places.size(), {0, scope.numel});
  std::vector<size_t> open;
  std::vector<int64_t> tasks, rank;
  std::vector<char> read(size_t(scope.num_tasks));
  for (size_t i = 0; i < places.size(); ++i) {
    if (places[i].rank > scope.numel) continue;
    if (places[i].rank == 0) {
      limits[i] = {kInfinityKey<Key>, 0};
      continue;
    }
    open.push_back(i), tasks.push_back(places[i].task), rank.push_back(places[i].rank);
    read[size_t(places[i].task)] = true;
  }
  if (nonfinite == NonFinite::error && std::count(read.begin(), read.end(), false)) check_finite<Key>(scope, names);
  if (open.empty()) return limits;

  const Tally<Key> tally = count(scope, tasks, brackets<Key>(scope, tasks, rank, drop), drop, !all_ties);
  if (nonfinite == NonFinite::error && !is_finite(scope, tally)) check_finite<Key>(scope, names);

  const auto cut = [&](const Tally<Key>& of, size_t slot, size_t s) {
    const Place& place = places[open[s]];
    return cut_of(scope, of, slot, place.rank, place.from_smallest, limits[open[s]].threshold, drop);
  };
  std::vector<char> found(open.size());
  for_each_expert(scope, int64_t(open.size()), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      Limit<Key>& limit = limits[open[s]];
      found[s] = !forced_histogram && select(scope, tally, s, rank[s], &limit.threshold);
      if (found[s] && !all_ties) limit.cut = cut(tally, size_t(s), size_t(s));
    }
  });

  std::vector<size_t> missed;
  std::vector<int64_t> missed_tasks, missed_rank;
  for (size_t s = 0; s < open.size(); ++s)
    if (!found[s]) missed.push_back(s), missed_tasks.push_back(tasks[s]), missed_rank.push_back(rank[s]);
  if (missed.empty()) return limits;
  const std::vector<Key> thresholds = histogram_thresholds<Key>(scope, missed_tasks, missed_rank, drop);
  for (size_t m = 0; m < missed.size(); ++m) limits[open[missed[m]]].threshold = thresholds[m];
  if (all_ties) return limits;
  std::vector<Bracket<Key>> exact;
  for (const Key threshold : thresholds) exact.push_back(bracket_of(scope, threshold, threshold, /*counts_ends=*/true));
  const Tally<Key> at_threshold = count(scope, missed_tasks, exact, drop, /*want_ties=*/true);
  for (size_t m = 0; m < missed.size(); ++m) limits[open[missed[m]]].cut = cut(at_threshold, m, missed[m]);
  return limits;
}

template <class Key>
std::vector<Limit<Key>> trim(const Scope& scope, const std::vector<double>& density, Semantics semantics,
                             NonFinite nonfinite, const std::vector<std::string>& names) {
  std::vector<Place> places;
  for (size_t t = 0; t < density.size(); ++t) {
    const int64_t keep = keep_count(density[t], scope.numel, semantics);
    places.push_back({int64_t(t), keep < scope.numel ? keep : scope.numel + 1});
  }
  return limits_at<Key>(scope, places, semantics == Semantics::paper, nonfinite, names);
}

#define SK_INSTANTIATE(Key)                                                                                  \
  template void check_finite<Key>(const Scope&, const std::vector<std::string>&);                            \
  template std::vector<Limit<Key>> trim<Key>(const Scope&, const std::vector<double>&, Semantics, NonFinite, \
                                             const std::vector<std::string>&);
SK_INSTANTIATE(int32_t)
SK_INSTANTIATE(int64_t)
#undef SK_INSTANTIATE

namespace {

// As many for every expert, one expert after the other.
std::vector<Place> places_of(const std::vector<int64_t>& ranks, const Scope& scope) {
  require(!ranks.empty() && int64_t(ranks.size()) % scope.num_tasks == 0, "ranks must be as many for every expert (",
          scope.num_tasks, "), got ", ranks.size());
  const int64_t of_expert = int64_t(ranks.size()) / scope.num_tasks;
  std::vector<Place> places;
  for (const int64_t rank : ranks) {
    require(rank >= -scope.numel && rank <= scope.numel, "ranks must be in [-", scope.numel, ", ", scope.numel,
            "], the number of entries, got ", rank);
    const int64_t task = int64_t(places.size()) / of_expert;
    places.push_back({task, rank < 0 ? scope.numel + 1 + rank : rank, rank < 0});
  }
  return places;
}

std::tuple<Tensor, Tensor> trim_limits(std::vector<Tensor> base, std::vector<Tensor> experts,
                                       std::vector<double> density, std::string semantics_name,
                                       std::string nonfinite_name, std::optional<std::vector<std::string>> names,
                                       std::optional<std::vector<int64_t>> ranks) {
  const Semantics semantics = parse_semantics(semantics_name);
  const NonFinite nonfinite = parse_nonfinite(nonfinite_name);
  const Inputs inputs(base, experts, density.size());
  const std::vector<int64_t> shape{int64_t(ranks ? ranks->size() : density.size())};
  Tensor thresholds = torch::stable::new_empty(experts[0], shape, inputs.wide ? ScalarType::Double : ScalarType::Float);
  Tensor cuts = torch::stable::new_empty(experts[0], shape, ScalarType::Long);
  const auto fill = [&](auto key) {
    using Key = decltype(key);
    const std::vector<std::string> named = names.value_or(std::vector<std::string>());
    const auto limits =
        ranks ? limits_at<Key>(inputs.scope, places_of(*ranks, inputs.scope), /*all_ties=*/false, nonfinite, named)
              : trim<Key>(inputs.scope, density, semantics, nonfinite, named);
    for (size_t i = 0; i < limits.size(); ++i) {
      memcpy(static_cast<Key*>(thresholds.data_ptr()) + i, &limits[i].threshold, sizeof(Key));
      static_cast<int64_t*>(cuts.data_ptr())[i] = limits[i].cut;
    }
  };
  inputs.wide ? fill(int64_t()) : fill(int32_t());
  return {thresholds, cuts};
}

Tensor trim_thresholds(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density,
                       std::string semantics, std::string nonfinite) {
  check_one_tensor(experts, density);
  return std::get<0>(trim_limits(as_list(base), experts, density, semantics, nonfinite, std::nullopt, std::nullopt));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("trim_thresholds", TORCH_BOX(&trim_thresholds));
  m.impl("trim_limits", TORCH_BOX(&trim_limits));
}

}  // namespace sk
