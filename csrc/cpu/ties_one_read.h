// A TIES merge in one read. It goes by what a sample expects the thresholds to be, and keeps the places of all keys
// near them; when the exact limits are known, the few elements that they decide otherwise are merged once more.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "buffer.h"
#include "inputs.h"
#include "one_read_from.h"
#include "ties_merger.h"
#include "trim.h"

namespace sk {

inline bool reads_once(const Scope& scope, const TiesOptions& options, const KeepOptions& keep) {
  if (options.thresholds || options.rescale || keep.keep || keep.upper || keep.keep_density) return false;
  int64_t nbytes = 0;
  for (const Part& part : scope.parts)
    if (size_of(part.dtype) > 2)
      nbytes += (scope.num_tasks + (part.base != nullptr)) * part.numel * size_of(part.dtype);
  return nbytes >= one_read_from();
}

// Which keys a limit keeps, rounded or not; which zeros makes no difference.
template <class Key>
struct Kept {
  Interval<Key> ties;
  int64_t cut;

  Kept(const Scope& scope, const Limit<Key>& limit)
      : ties(ties_of(scope, limit.threshold)), cut(limit.threshold == 0 ? scope.numel : limit.cut) {}
  bool holds(Key key, int64_t flat) const { return key > ties.last || (key >= ties.first && flat < cut); }
};

// What an expert keeps by the limit that was assumed, and by the exact one.
template <class Key>
struct Decision {
  Kept<Key> assumed, exact;
  Bracket<Key> bracket;

  bool differs(Key key, int64_t flat) const { return assumed.holds(key, flat) != exact.holds(key, flat); }
  // Anywhere from `first` to `last`: what is decided changes at the cuts only.
  bool differs(Key key, int64_t first, int64_t last) const {
    const auto within = [&](int64_t flat) { return std::clamp(flat, first, last); };
    return differs(key, first) || differs(key, within(assumed.cut)) || differs(key, within(exact.cut));
  }
  // Among keys that are counted and have no places.
  bool differs_at_ends(const ChunkTies& n, int64_t first, int64_t last) const {
    return (n.at_hi > 0 && differs(bracket.top, first, last)) || (n.at_lo > 0 && differs(bracket.lo, first, last));
  }
};

// Some elements of a tensor, side by side, and their merge.
template <class Key>
class Gathered {
 public:
  static constexpr int64_t kMost = 256;

  explicit Gathered(int64_t num_tasks)
      : num_tasks_(num_tasks), values_((num_tasks + 2) * kMost * int64_t(sizeof(double))), limits_(size_t(num_tasks)) {
    for (int64_t t = 0; t < num_tasks; ++t) experts_.push_back(values_.get() + t * kMost * int64_t(sizeof(double)));
  }

  void take(const Part& part, int64_t begin, const int32_t* indices, int64_t n) {
    for (int64_t t = 0; t < num_tasks_; ++t) take(part, part.expert_at(t, begin), indices, n, row(t));
    if (part.base) take(part, part.base_at(begin), indices, n, row(num_tasks_));
    n_ = n, has_base_ = part.base != nullptr;
  }

  // By the limits of elements at `flat`; draws, if any: room for kMost.
  TiesResult merge(TiesArgs<Key> args, const TiesKernel<Key>& kernel, Rule rule, const std::vector<Limit<Key>>& limits,
                   int64_t flat, Draw* draws) {
    for (size_t t = 0; t < limits.size(); ++t)
      limits_[t] = kept_above<Key>(flat < limits[t].cut ? limits[t].threshold - 1 : limits[t].threshold);
    args.base = has_base_ ? row(num_tasks_) : nullptr;
    args.experts = experts_.data();
    args.limits = limits_.data();
    args.n = n_;
    args.draws = draws;
    args.max_draws = draws ? int(kMost) : 0;
    return kernel.merge[int(rule)](args, row(num_tasks_ + 1));
  }

  void put(char* out, int64_t size, const int32_t* indices) {
    for (int64_t i = 0; i < n_; ++i) memcpy(out + indices[i] * size, row(num_tasks_ + 1) + i * size, size_t(size));
  }

 private:
  char* row(int64_t t) { return values_.get() + t * kMost * int64_t(sizeof(double)); }

  static void take(const Part& part, const char* from, const int32_t* indices, int64_t n, char* to) {
    const auto gather = [&](auto value) {
      using Value = decltype(value);
      for (int64_t i = 0; i < n; ++i)
        memcpy(to + i * int64_t(sizeof(Value)), from + indices[i] * int64_t(sizeof(Value)), sizeof(Value));
    };
    size_of(part.dtype) == 8 ? gather(int64_t()) : size_of(part.dtype) == 4 ? gather(int32_t()) : gather(int16_t());
  }

  const int64_t num_tasks_;
  const Buffer<char> values_;  // [num_tasks + 2, kMost]: the experts, the base, the merge
  std::vector<const void*> experts_;
  std::vector<Key> limits_;
  int64_t n_ = 0;
  bool has_base_ = false;
};

template <class Key>
class OneRead {
 public:
  OneRead(const Scope& scope, const TiesOptions& options, Merger<Key>& merger, const Outputs& outputs)
      : scope_(scope), options_(options), merger_(merger), outputs_(outputs) {}

  template <class Merge, class Patch>
  void run(const Merge& merge, const Patch& patch) {
    LimitSearch<Key> search(scope_, places_to_keep(scope_, options_.density, options_.semantics),
                            options_.semantics == Semantics::paper, options_.nonfinite, options_.names);
    if (!search.needs_a_read()) {
      merger_.set_limits(search.limits());
      merger_.run(kMaxDraws, merge, patch);
      return;
    }
    assumed_ = search.expect(Wanted::places);
    merger_.set_limits(assumed_);
    Draws draws = merger_.new_draws();
    const Tally<Key> tally = search.count(Wanted::places, [&] {
      const auto scratch = std::make_shared<typename Merger<Key>::Scratch>(merger_.new_scratch());
      Draws::List* const list = &draws.new_list();
      return [&, scratch, list](int64_t c) {
        merger_.merge_under_guess(c, draws.guess(), *scratch, kMaxDraws, merge, draws, *list);
        scope_.report(scope_.chunk(c));  // the second of two times
      };
    });
    merger_.set_limits(search.settle(tally));
    if (search.missed() || lost_places(tally)) {
      merger_.run(kMaxDraws, merge, patch);
      return;
    }
    const std::vector<Decision<Key>> decisions = decisions_of(search, tally);
    torch::stable::parallel_for(0, int64_t(tally.ranges.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) correct(tally, tally.ranges[size_t(r)], decisions, draws, merge);
    });
    merger_.settle(draws, kMaxDraws, merge, patch);
  }

 private:
  static bool lost_places(const Tally<Key>& tally) {
    return std::any_of(tally.ranges.begin(), tally.ranges.end(), [](const auto& range) {
      return std::count(range.overflowed.begin(), range.overflowed.end(), true) > 0;
    });
  }

  std::vector<Decision<Key>> decisions_of(const LimitSearch<Key>& search, const Tally<Key>& tally) const {
    std::vector<Decision<Key>> decisions;
    for (size_t s = 0; s < search.open().size(); ++s) {
      const size_t i = search.open()[s];
      decisions.push_back({{scope_, assumed_[i]}, {scope_, merger_.limits()[i]}, tally.brackets[s]});
    }
    return decisions;
  }

  template <class Merge>
  void correct(const Tally<Key>& tally, const typename Tally<Key>::Range& range,
               const std::vector<Decision<Key>>& decisions, Draws& draws, const Merge& merge) const {
    const size_t slots = decisions.size();
    typename Merger<Key>::Scratch scratch = merger_.new_scratch();
    Draws::List& list = draws.new_list();
    Gathered<Key> gathered(scope_.num_tasks);
    std::vector<int64_t> before(slots);  // keys inside, of earlier chunks
    for (int64_t c = range.first; c < range.last; ++c) {
      const Chunk chunk = scope_.chunk(c);
      const int64_t first = chunk.part.offset + chunk.begin, last = first + chunk.count - 1;
      Marks marks;
      bool everywhere = false;
      for (size_t s = 0; s < slots; ++s) {
        const ChunkTies& n = tally.ties[size_t(c) * slots + s];
        const Decision<Key>& decision = decisions[s];
        everywhere |= decision.differs_at_ends(n, first, last);
        const Key *const keys = range.inside[s].data.get() + before[s], *const at = range.at[s].data.get() + before[s];
        for (int64_t i = 0; i < n.inside; ++i) marks.set(at[i], decision.differs(keys[i], first + at[i]));
        before[s] += n.inside;
      }
      if (everywhere)
        merger_.merge_under_guess(c, draws.guess(), scratch, kMaxDraws, merge, draws, list);
      else
        correct(chunk, marks, gathered, draws, list);
    }
  }

  // Elements of a chunk.
  struct Marks {
    std::array<uint64_t, kChunk / 64> words = {};

    void set(int64_t i, bool on) { words[size_t(i) / 64] |= uint64_t(on) << i % 64; }
    bool has(int64_t i) const { return words[size_t(i) / 64] >> i % 64 & 1; }
    std::vector<int32_t> indices() const {
      std::vector<int32_t> found;
      for (size_t w = 0; w < words.size(); ++w)
        for (uint64_t word = words[w]; word; word &= word - 1) found.push_back(int32_t(w * 64) + __builtin_ctzll(word));
      return found;
    }
  };

  void correct(const Chunk& chunk, const Marks& marks, Gathered<Key>& gathered, Draws& draws, Draws::List& list) const {
    const std::vector<int32_t> indices = marks.indices();
    const TiesKernel<Key>& kernel = SK_KERNELS(ties_kernels).template get<Key>(chunk.part.dtype);
    const int64_t flat = chunk.part.offset + chunk.begin;
    Correction correction(draws, chunk.index, marks);
    for (size_t i = 0; i < indices.size();) {
      const size_t n = size_t(run_length(indices, i, flat));
      gathered.take(chunk.part, chunk.begin, &indices[i], int64_t(n));
      const TiesArgs<Key> args = merger_.args_of(chunk.part_index, int64_t(n), correction.sign);
      TiesResult before = {0, 0};
      if (draws.any()) before = gathered.merge(args, kernel, options_.rule, assumed_, flat + indices[i], nullptr);
      const TiesResult after = gathered.merge(args, kernel, options_.rule, merger_.limits(), flat + indices[i],
                                              draws.any() ? correction.room.data() : nullptr);
      correction.add(before, after, &indices[i]);
      gathered.put(outputs_.at(scope_, chunk.part_index, chunk.begin), size_of(chunk.part.dtype), &indices[i]);
      i += n;
    }
    if (!indices.empty()) correction.set(draws, list);
  }

  // How many of the indices from the i-th on one limit per expert serves.
  int64_t run_length(const std::vector<int32_t>& indices, size_t i, int64_t flat) const {
    const int64_t most = std::min<int64_t>(Gathered<Key>::kMost, int64_t(indices.size() - i));
    int64_t end = scope_.numel;
    for (const Limit<Key>& limit : merger_.limits())
      if (limit.cut > flat + indices[i]) end = std::min(end, limit.cut);
    return std::lower_bound(&indices[i], &indices[i] + most, end - flat) - &indices[i];
  }

  // The elections of a chunk after some of its elements were merged once more.
  struct Correction {
    int64_t chunk;
    int8_t sign;
    TiesResult result;
    bool unrecorded;
    std::vector<Draw> draws;
    std::array<Draw, Gathered<Key>::kMost> room;

    Correction(Draws& of, int64_t chunk, const Marks& marks) : chunk(chunk) {
      if (!of.any()) return;
      const Draws::Guess& guess = of[chunk];
      sign = guess.sign ? guess.sign : of.guess();
      result = {guess.sign_sum, guess.num_draws};
      unrecorded = guess.num_draws > kMaxDraws;
      for (int32_t d = 0; d < (unrecorded ? 0 : guess.num_draws); ++d)
        if (!marks.has(guess.begin()[d].index)) draws.push_back(guess.begin()[d]);
    }
    void add(TiesResult before, TiesResult after, const int32_t* indices) {
      result.sign_sum += after.sign_sum - before.sign_sum;
      result.num_draws += after.num_draws - before.num_draws;
      for (int64_t d = 0; d < after.num_draws; ++d) {
        draws.push_back(room[size_t(d)]);
        draws.back().index = indices[draws.back().index];
      }
    }
    void set(Draws& of, Draws::List& list) {
      if (!of.any()) return;
      if (unrecorded) result.num_draws = std::max<int64_t>(result.num_draws, kMaxDraws + 1);
      of.set(chunk, sign, result, draws.data(), kMaxDraws, list);
    }
  };

  const Scope& scope_;
  const TiesOptions& options_;
  Merger<Key>& merger_;
  const Outputs& outputs_;
  std::vector<Limit<Key>> assumed_;
};

}  // namespace sk
