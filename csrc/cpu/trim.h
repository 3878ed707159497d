// Exact per-expert thresholds over a scope, in one read of its tensors.
#pragma once
#include <string>
#include <vector>

#include "../trim_options.h"
#include "scope.h"
#include "trim_brackets.h"
#include "trim_tally.h"

namespace sk {

// An entry is kept when its key is above the threshold, or equals it and lies before `cut` in the scope's flat order.
template <class Key>
struct Limit {
  Key threshold;
  int64_t cut;
};

// One limit to find: the rank-th largest key of an expert. Rank 0 keeps nothing; one above the number of entries keeps
// all of them, and neither is looked for.
struct Place {
  int64_t task, rank;
  bool from_smallest = false;  // the cut ends the ties of the smallest entries
};

// The search for limits in its steps, for those who have more to do in the same read: while needs_a_read(), expect(),
// count() and settle().
template <class Key>
class LimitSearch {
 public:
  // all_ties: without a cut among the ties.
  LimitSearch(const Scope& scope, const std::vector<Place>& places, bool all_ties, NonFinite nonfinite,
              const std::vector<std::string>& names);

  bool needs_a_read() const { return !open_.empty(); }
  // The limits of those that are not looked for; of the others what a sample says.
  const std::vector<Limit<Key>>& expect(Wanted wanted);
  // The one read; raises for NaN and infinity under NonFinite::error.
  Tally<Key> count(Wanted wanted, const Beside& beside = nullptr);
  // The exact limits. Without luck (missed(), afterwards) it takes more reads.
  const std::vector<Limit<Key>>& settle(const Tally<Key>& tally);
  const std::vector<Limit<Key>>& limits() const { return limits_; }
  bool missed() const { return missed_; }
  const std::vector<size_t>& open() const { return open_; }  // the limit of every slot of the tally

 private:
  const Scope& scope_;
  const bool all_ties_;
  const NonFinite nonfinite_;
  const std::vector<std::string>& names_;
  std::vector<Place> places_;
  std::vector<Limit<Key>> limits_;
  std::vector<size_t> open_;
  std::vector<int64_t> tasks_, rank_;  // of the open places
  std::vector<Bracket<Key>> brackets_;
  bool missed_ = false;
};

template <class Key>
std::vector<Limit<Key>> limits_at(const Scope& scope, const std::vector<Place>& places, bool all_ties,
                                  NonFinite nonfinite, const std::vector<std::string>& names);

// density[t]: the share of its entries that expert t keeps.
std::vector<Place> places_to_keep(const Scope& scope, const std::vector<double>& density, Semantics semantics);

// The limits of those places. Without a cut among the ties it is the scope's numel.
template <class Key>
std::vector<Limit<Key>> trim(const Scope& scope, const std::vector<double>& density, Semantics semantics,
                             NonFinite nonfinite, const std::vector<std::string>& names);

// Test only: every bracket misses, so the radix histogram decides.
void force_histogram(bool on);

}  // namespace sk
