// TIES at one element: what every expert brings, the election, the merge, and its rounding.
#pragma once
#include "../ties_rule.h"
#include "scope.h"
#include "trim.h"
#include "values.h"

namespace sk {
namespace cuda {
namespace {

// What a merge says of itself.
struct Report {
  int nonfinite;
  long long sign_sum;  // of the elected signs, draws as 0
};

template <class Key>
struct Arguments {
  using C = ComputeOf<Key>;

  Scope scope;
  const Limit<Key>* limits;  // [num_tasks]
  const C* weights;          // [num_parts, num_tasks] or null: all one
  const C* rescales;         // [num_parts, num_tasks] or null: all one
  const C* divisors;         // [num_parts] mergekit without an election; else null
  C lam;
  bool elect_count, divide, error, drop;
  Report* report;
  unsigned char* drew;  // [num_chunks] paper: 1 where an election was a draw between entries
  bool again;           // only chunks that drew, when their sign was guessed wrong
};

// One expert, as a chunk needs it.
template <class Key>
struct Task {
  using C = typename Arguments<Key>::C;

  const void* expert;
  C weight, rescale;
  Key limit;  // keeps keys above, and from `cut` on, one more
  int cut;    // within the chunk
};

template <class Key>
__device__ Key kept_above(Key threshold) {  // 0 adds nothing; NaN is never trimmed away
  return threshold < 0 ? 0 : threshold > kInfinityKey<Key> ? kInfinityKey<Key> : threshold;
}

// One expert's entry at one element.
template <class C>
struct Entry {
  C elected, summed;  // what the election and the merge add up
  bool kept, positive, negative;
};

template <class S, Rule rule>
__device__ Entry<ComputeOf<S>> entry(const Arguments<KeyOf<ComputeOf<S>>>& args, const Task<KeyOf<ComputeOf<S>>>& task,
                                     KeyOf<ComputeOf<S>> limit, S expert, S base, bool has_base) {
  using C = ComputeOf<S>;
  using Key = KeyOf<C>;
  C tau = to_compute(task_vector(expert, base, has_base));
  if (args.drop && (bits(tau) & kMaxKey<Key>) >= kInfinityKey<Key>) tau = 0;

  // With its sign bit set a value is a negative key, so either test holds for one sign only; 0 never passes.
  const bool positive = bits(tau) > limit, negative = bits(-tau) > limit, number = tau == tau;
  Entry<C> e = {tau, tau, positive || negative, positive && number, negative && number};
  if constexpr (rule == Rule::mergekit) {
    if (args.rescales || args.weights || args.divisors) {
      if (args.rescales) tau = round_to<S>(tau * task.rescale);
      if (args.divisors && !e.kept) tau = 0;
      if (args.weights) tau = round_to<S>(tau * task.weight);
      e.elected = e.summed = tau;
      e.positive = tau > 0 && e.kept;
      e.negative = tau < 0 && e.kept;
    }
  }
  if constexpr (rule == Rule::peft)
    if (args.weights) e.summed = tau * task.weight;
  return e;
}

// Running sums over the experts at one element, for either outcome of the election.
template <class C>
struct Sums {
  C total = 0, positive = 0, negative = 0;
  C positive_weight = 0, negative_weight = 0;  // mergekit with weights
  int counts = 0;                              // of positive entries, and of negative ones in the upper half

  __device__ int positives() const { return counts & 0xFFFF; }
  __device__ int negatives() const { return counts >> 16; }
};

// everything: an infinite weight makes NaN of entries that are not kept.
template <Rule rule, class C>
__device__ void accumulate(Sums<C>& s, const Entry<C>& e, C weight, bool everything) {
  if (e.kept || everything) s.total += e.elected;
  if constexpr (rule == Rule::paper_max) {
    if (e.positive && !(s.positive > e.summed)) s.positive = e.summed;
    if (e.negative && !(e.summed > s.negative)) s.negative = e.summed;
  } else {
    if (e.positive) s.positive += e.summed;
    if (e.negative) s.negative += e.summed;
  }
  s.counts += (e.positive ? 1 : 0) + (e.negative ? 0x10000 : 0);
  if constexpr (rule == Rule::mergekit) {
    if (e.positive) s.positive_weight += weight;
    if (e.negative) s.negative_weight += weight;
  }
}

template <Rule rule>
constexpr bool kIsPaper = rule == Rule::paper || rule == Rule::paper_max;

// The elected sign; `open`: the election was a draw that takes the sign of the scope.
struct Election {
  int sign;
  bool open;
};

template <Rule rule, class C>
__device__ Election elect(const Sums<C>& s, bool by_count) {
  const C mass = by_count ? C(s.positives()) - C(s.negatives()) : s.total;
  const bool positive = mass > 0, negative = mass < 0;
  // Under mergekit and PEFT a draw elects plus. Under the paper it has no sign yet.
  if (!kIsPaper<rule>) return {negative ? -1 : 1, false};
  return {positive - negative, !positive && !negative};
}

// The sum of all entries, as mergekit rounds it without an election.
template <class S>
__device__ ComputeOf<S> finish_all(const Arguments<KeyOf<ComputeOf<S>>>& args, ComputeOf<S> sum, ComputeOf<S> divisor,
                                   ComputeOf<S> base, bool has_base) {
  ComputeOf<S> m = round_to<S>(sum);
  if (args.divide) m = round_to<S>(m / divisor);
  m = round_to<S>(m * args.lam);
  return has_base ? base + m : m;
}

template <class S, Rule rule>
__device__ ComputeOf<S> finish(const Arguments<KeyOf<ComputeOf<S>>>& args, const Sums<ComputeOf<S>>& s, int sign,
                               ComputeOf<S> base, bool has_base) {
  using C = ComputeOf<S>;
  // Draws without a sign sum the negative entries, as the official code does; its max multiplies by the sign, 0.
  C m = sign > 0 ? s.positive : s.negative;
  if (rule == Rule::paper_max && sign == 0) m = 0;
  if constexpr (rule != Rule::peft) m = round_to<S>(m);
  if (args.divide) {
    C n = C(sign > 0 ? s.positives() : s.negatives());
    if constexpr (rule == Rule::mergekit)
      if (args.weights) n = round_to<S>(sign > 0 ? s.positive_weight : s.negative_weight);
    m = m / (n == 0 ? C(1) : n);
    if constexpr (rule == Rule::mergekit) m = round_to<S>(m);
  }
  m = m * args.lam;
  if (rule == Rule::mergekit || rule == Rule::paper_max || (rule == Rule::paper && !args.divide)) m = round_to<S>(m);
  if (has_base) m = base + m;
  // A NaN among the kept entries reaches the output whatever was elected.
  return s.total == s.total ? m : s.total;
}

}  // namespace
}  // namespace cuda
}  // namespace sk
