#include "trim.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <tuple>

#include "finite.h"
#include "inputs.h"
#include "select.h"
#include "trim_brackets.h"
#include "trim_histogram.h"
#include "trim_keys.h"
#include "trim_tally.h"

namespace sk {
namespace {

std::atomic<bool> forced_histogram{false};

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
    KeyReader<Key> reader(scope);
    reader.move_to(chunk.part, chunk.begin, chunk.count);
    reader.kernel().keys(reader.base(), reader.expert(tally.tasks[s]), chunk.count, drop, keys.data());
    int64_t i = 0;
    for (; budget > 0 && i < chunk.count; ++i) budget -= keys[size_t(i)] == threshold;
    return chunk.part.offset + chunk.begin + i;
  }
  return scope.numel;
}

}  // namespace

void force_histogram(bool on) { forced_histogram = on; }

template <class Key>
LimitSearch<Key>::LimitSearch(const Scope& scope, const std::vector<Place>& places, bool all_ties, NonFinite nonfinite,
                              const std::vector<std::string>& names)
    : scope_(scope),
      all_ties_(all_ties),
      nonfinite_(nonfinite),
      names_(names),
      places_(places),
      limits_(places.size(), {0, scope.numel}) {
  std::vector<char> read(size_t(scope.num_tasks));
  for (size_t i = 0; i < places.size(); ++i) {
    if (places[i].rank > scope.numel) continue;
    if (places[i].rank == 0) {
      limits_[i] = {kInfinityKey<Key>, 0};
      continue;
    }
    open_.push_back(i), tasks_.push_back(places[i].task), rank_.push_back(places[i].rank);
    read[size_t(places[i].task)] = true;
  }
  if (nonfinite == NonFinite::error && std::count(read.begin(), read.end(), false)) check_finite<Key>(scope, names);
}

template <class Key>
const std::vector<Limit<Key>>& LimitSearch<Key>::expect(Wanted wanted) {
  Expected<Key> found = expected<Key>(scope_, tasks_, rank_, nonfinite_ == NonFinite::drop, wanted);
  brackets_ = std::move(found.brackets);
  for (size_t s = 0; s < open_.size(); ++s)
    limits_[open_[s]] = {found.middles[s], all_ties_ ? scope_.numel : found.cuts[s]};
  return limits_;
}

template <class Key>
Tally<Key> LimitSearch<Key>::count(Wanted wanted, const Beside& beside) {
  Tally<Key> tally = sk::count(scope_, tasks_, brackets_, nonfinite_ == NonFinite::drop, wanted, beside);
  if (nonfinite_ == NonFinite::error && !is_finite(scope_, tally)) check_finite<Key>(scope_, names_);
  return tally;
}

template <class Key>
const std::vector<Limit<Key>>& LimitSearch<Key>::settle(const Tally<Key>& tally) {
  const bool drop = nonfinite_ == NonFinite::drop;
  const auto cut = [&](const Tally<Key>& of, size_t slot, size_t s) {
    const Place& place = places_[open_[s]];
    return cut_of(scope_, of, slot, place.rank, place.from_smallest, limits_[open_[s]].threshold, drop);
  };
  std::vector<char> found(open_.size());
  for_each_expert(scope_, int64_t(open_.size()), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      Limit<Key>& limit = limits_[open_[s]];
      found[s] = !forced_histogram && select(scope_, tally, s, rank_[s], &limit.threshold);
      limit.cut = found[s] && !all_ties_ ? cut(tally, size_t(s), size_t(s)) : scope_.numel;
    }
  });

  std::vector<size_t> missed;
  std::vector<int64_t> missed_tasks, missed_rank;
  for (size_t s = 0; s < open_.size(); ++s)
    if (!found[s]) missed.push_back(s), missed_tasks.push_back(tasks_[s]), missed_rank.push_back(rank_[s]);
  missed_ = !missed.empty();
  if (!missed_) return limits_;
  const std::vector<Key> thresholds = histogram_thresholds<Key>(scope_, missed_tasks, missed_rank, drop);
  for (size_t m = 0; m < missed.size(); ++m) limits_[open_[missed[m]]].threshold = thresholds[m];
  if (all_ties_) return limits_;
  std::vector<Bracket<Key>> exact;
  for (const Key threshold : thresholds)
    exact.push_back(bracket_of(scope_, threshold, threshold, /*counts_ends=*/true));
  const Tally<Key> at_threshold = sk::count(scope_, missed_tasks, exact, drop, Wanted::ties);
  for (size_t m = 0; m < missed.size(); ++m) limits_[open_[missed[m]]].cut = cut(at_threshold, m, missed[m]);
  return limits_;
}

template <class Key>
std::vector<Limit<Key>> limits_at(const Scope& scope, const std::vector<Place>& places, bool all_ties,
                                  NonFinite nonfinite, const std::vector<std::string>& names) {
  LimitSearch<Key> search(scope, places, all_ties, nonfinite, names);
  if (search.needs_a_read()) {
    const Wanted wanted = all_ties ? Wanted::nothing : Wanted::ties;
    search.expect(wanted);
    search.settle(search.count(wanted));
  }
  return search.limits();
}

std::vector<Place> places_to_keep(const Scope& scope, const std::vector<double>& density, Semantics semantics) {
  std::vector<Place> places;
  for (size_t t = 0; t < density.size(); ++t) {
    const int64_t keep = keep_count(density[t], scope.numel, semantics);
    places.push_back({int64_t(t), keep < scope.numel ? keep : scope.numel + 1});
  }
  return places;
}

template <class Key>
std::vector<Limit<Key>> trim(const Scope& scope, const std::vector<double>& density, Semantics semantics,
                             NonFinite nonfinite, const std::vector<std::string>& names) {
  return limits_at<Key>(scope, places_to_keep(scope, density, semantics), semantics == Semantics::paper, nonfinite,
                        names);
}

#define SK_INSTANTIATE(Key)                                                                                  \
  template class LimitSearch<Key>;                                                                           \
  template std::vector<Limit<Key>> limits_at<Key>(const Scope&, const std::vector<Place>&, bool, NonFinite,  \
                                                  const std::vector<std::string>&);                          \
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
