#include "ties_merge_kernel.h"

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

// One expert's entries at one vector of elements.
template <class C>
struct Entry {
  Vec<C> elected, summed;  // what the election and the merge add up
  typename Vec<C>::Mask kept, positive, negative;
};

template <Rule rule>
constexpr bool kMergekit = rule == Rule::mergekit || rule == Rule::mergekit_all;

// plain: there is a base and no entry is dropped. The tests in every inner loop would cost up to a third of its time.
template <class S, Rule rule, bool plain>
inline Entry<typename Compute<S>::type> entry(const TiesArgs<typename Compute<S>::Key>& args, int t,
                                              Vec<typename Compute<S>::type> expert,
                                              Vec<typename Compute<S>::type> base) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  V tau = plain || args.base ? round_to(expert - base, S{}) : expert;
  if (!plain && args.drop) tau = zero_unless_finite(tau);

  // With its sign bit set a value is a negative key, so either test holds for one sign only; 0 never passes.
  const auto limit = V::keys(args.limits[t]);
  Entry<C> e;
  e.positive = greater_key<C>(bits(tau), limit);
  e.negative = greater_key<C>(flip_sign<C>(bits(tau)), limit);
  e.kept = e.positive | e.negative;
  // A lane with NaN ends as NaN whatever it elects; only a count of the paper asks what the others elect there.
  if ((rule == Rule::paper || rule == Rule::paper_max) && args.elect_count && !args.finite) {
    const auto number = equal(tau, tau);
    e.positive = e.positive & number;
    e.negative = e.negative & number;
  }
  e.elected = e.summed = tau;
  if constexpr (kMergekit<rule>) {
    if (args.rescales) tau = round_to(tau * V::set(args.rescales[t]), S{});
    if (rule == Rule::mergekit_all) tau = zero_unless<C>(e.kept, tau);
    if (args.weights) tau = round_to(tau * V::set(args.weights[t]), S{});
    e.elected = e.summed = tau;
    if (rule == Rule::mergekit && (args.rescales || args.weights)) {
      e.positive = greater(tau, V::set(0)) & e.kept;
      e.negative = greater(V::set(0), tau) & e.kept;
    }
  }
  if constexpr (rule == Rule::peft)
    if (args.weights) e.summed = tau * V::set(args.weights[t]);
  return e;
}

// Running sums over the experts, for either outcome of the election.
template <class C>
struct Sums {
  using Key = typename Vec<C>::Key;
  Vec<C> total = Vec<C>::set(0), positive = total, negative = total;
  Vec<C> positive_weight = total, negative_weight = total;  // mergekit with weights
  Key positive_count = Vec<C>::keys(0), negative_count = positive_count;
};

template <Rule rule, class C>
inline void accumulate(Sums<C>& s, const Entry<C>& e, const TiesArgs<typename Compute<C>::Key>& args, int t) {
  if constexpr (rule == Rule::mergekit_all) {
    s.total = s.total + e.elected;
    return;
  }
  s.total = add_where<C>(e.kept, s.total, e.elected);
  if constexpr (rule == Rule::paper_max) {
    s.positive = select<C>(and_not<C>(e.positive, greater(s.positive, e.summed)), e.summed, s.positive);
    s.negative = select<C>(and_not<C>(e.negative, greater(e.summed, s.negative)), e.summed, s.negative);
  } else {
    s.positive = add_where<C>(e.positive, s.positive, e.summed);
    s.negative = add_where<C>(e.negative, s.negative, e.summed);
  }
  s.positive_count = tally<C>(s.positive_count, e.positive);
  s.negative_count = tally<C>(s.negative_count, e.negative);
  if constexpr (rule == Rule::mergekit)
    if (args.weights) {
      const Vec<C> weight = Vec<C>::set(args.weights[t]);
      s.positive_weight = add_where<C>(e.positive, s.positive_weight, weight);
      s.negative_weight = add_where<C>(e.negative, s.negative_weight, weight);
    }
}

template <class C>
struct Election {
  typename Vec<C>::Mask positive, negative, drawn;
};

// Under mergekit and PEFT a draw elects plus. Under the paper it has no sign yet.
template <Rule rule, class C>
inline Election<C> elect(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s) {
  using V = Vec<C>;
  const V zero = V::set(0);
  const V mass = args.elect_count ? to_lanes<C>(s.positive_count) - to_lanes<C>(s.negative_count) : s.total;
  const auto positive = greater(mass, zero), negative = greater(zero, mass);
  if (rule == Rule::mergekit || rule == Rule::peft)
    return {and_not<C>(V::all(), negative), negative, and_not<C>(positive, positive)};
  return {positive, negative, and_not<C>(equal(s.total, s.total), positive | negative)};  // NaN has no draw
}

template <class C>
inline Election<C> with_draws(Election<C> e, int sign) {
  using Mask = typename Vec<C>::Mask;
  if (sign > 0) e.positive = Mask(e.positive | e.drawn);
  if (sign < 0) e.negative = Mask(e.negative | e.drawn);
  return e;
}

// The sum of all entries, as mergekit rounds it without an election.
template <class S, class C>
inline Vec<C> finish_all(const TiesArgs<typename Compute<C>::Key>& args, Vec<C> sum, Vec<C> base) {
  using V = Vec<C>;
  V m = round_to(sum, S{});
  if (args.divide) m = round_to(m / V::set(args.divisor), S{});
  m = round_to(m * V::set(args.lam), S{});
  return args.base ? base + m : m;
}

template <class S, Rule rule, class C>
inline Vec<C> finish(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s, const Election<C>& sign,
                     Vec<C> base) {
  using V = Vec<C>;
  // Draws without a sign sum the negative entries, as the official code does; its max multiplies by the sign, 0.
  V m = select<C>(sign.positive, s.positive, s.negative);
  if constexpr (rule == Rule::paper_max) m = zero_unless<C>(sign.positive | sign.negative, m);
  if constexpr (rule != Rule::peft) m = round_to(m, S{});
  if (args.divide) {
    V n = select<C>(sign.positive, to_lanes<C>(s.positive_count), to_lanes<C>(s.negative_count));
    if constexpr (rule == Rule::mergekit)
      if (args.weights) n = round_to(select<C>(sign.positive, s.positive_weight, s.negative_weight), S{});
    m = m / select<C>(equal(n, V::set(0)), V::set(1), n);
    if constexpr (rule == Rule::mergekit) m = round_to(m, S{});
  }
  m = m * V::set(args.lam);
  if (rule == Rule::mergekit || rule == Rule::paper_max || (rule == Rule::paper && !args.divide)) m = round_to(m, S{});
  if (args.base) m = base + m;
  // A NaN among the kept entries reaches the output whatever was elected.
  return select<C>(equal(s.total, s.total), m, s.total);
}

// Signs elected by a run, lane by lane.
template <class C>
struct Votes {
  typename Vec<C>::Key positive = Vec<C>::keys(0), negative = positive;

  void add(const Election<C>& e) {
    positive = tally<C>(positive, e.positive);
    negative = tally<C>(negative, e.negative);
  }
  int64_t sum() const { return sum_keys<C>(positive) - sum_keys<C>(negative); }
};

template <class S>
inline Block<typename Compute<S>::type> load_at(const void* p, int64_t i) {
  return load_block(static_cast<const S*>(p) + i);
}
template <class S>
inline Block<typename Compute<S>::type> load_at(const void* p, int64_t i, int count) {
  return load_block(static_cast<const S*>(p) + i, count);
}

template <class S, class... Count>
inline Block<typename Compute<S>::type> base_at(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                                                Count... count) {
  using V = Vec<typename Compute<S>::type>;
  return args.base ? load_at<S>(args.base, i, count...) : Block<typename Compute<S>::type>{V::set(0), V::set(0)};
}

template <class S, Rule rule, bool plain, class... Count>
inline void sum_block(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                      const Block<typename Compute<S>::type>& base, Sums<typename Compute<S>::type> (&sums)[2],
                      Count... count) {
  for (int t = 0; t < args.num_tasks; ++t) {
    const auto expert = load_at<S>(args.experts[t], i, count...);
    for (int h = 0; h < 2; ++h)
      accumulate<rule>(sums[h], entry<S, rule, plain>(args, t, expert.v[h], base.v[h]), args, t);
  }
}

// Records the draws of a block under the other sign. Drawn elements are rare; a second election here is not.
template <class S, Rule rule>
inline void record_draws(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                         const Sums<typename Compute<S>::type> (&sums)[2],
                         const Election<typename Compute<S>::type> (&elections)[2],
                         const Block<typename Compute<S>::type>& base, TiesResult& result) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  constexpr int N = Block<C>::N;
  Block<C> other, open;  // open: 1 where a draw had entries
  for (int h = 0; h < 2; ++h) {
    const auto voted = greater_key<C>(sums[h].positive_count, V::keys(0)) & elections[h].drawn;
    open.v[h] = zero_unless<C>(voted, V::set(1));
    other.v[h] = finish<S, rule>(args, sums[h], with_draws(elections[h], -args.zero_sign), base.v[h]);
  }
  S values[N], flags[N];
  store_block(other, values);
  store_block(open, flags);
  for (int j = 0; j < N; ++j) {
    const S none = {};
    if (memcmp(&flags[j], &none, sizeof none) == 0) continue;
    if (result.num_draws < args.max_draws) {
      Draw& draw = args.draws[result.num_draws];
      draw.index = i + j;
      memcpy(draw.value, &values[j], sizeof(S));
    }
    ++result.num_draws;
  }
}

template <class S, Rule rule, bool plain, class... Count>
inline Block<typename Compute<S>::type> merge_block(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                                                    Votes<typename Compute<S>::type>& votes, TiesResult& result,
                                                    Count... count) {
  using C = typename Compute<S>::type;
  const Block<C> base = base_at<S>(args, i, count...);
  Sums<C> sums[2];
  sum_block<S, rule, plain>(args, i, base, sums, count...);
  Block<C> merged;
  if constexpr (rule == Rule::mergekit_all) {
    for (int h = 0; h < 2; ++h) merged.v[h] = finish_all<S>(args, sums[h].total, base.v[h]);
    return merged;
  }
  Election<C> elections[2];
  for (int h = 0; h < 2; ++h) {
    elections[h] = elect<rule>(args, sums[h]);
    votes.add(elections[h]);
    merged.v[h] = finish<S, rule>(args, sums[h], with_draws(elections[h], args.zero_sign), base.v[h]);
  }
  if constexpr (rule == Rule::paper || rule == Rule::paper_max) {
    // A draw between entries has some of either sign.
    const auto open = [&](int h) {
      return greater_key<C>(sums[h].positive_count, Vec<C>::keys(0)) & elections[h].drawn;
    };
    if (any<C>(typename Vec<C>::Mask(open(0) | open(1)))) record_draws<S, rule>(args, i, sums, elections, base, result);
  }
  return merged;
}

template <class S, Rule rule, bool plain>
TiesResult merge_run(const TiesArgs<typename Compute<S>::Key>& args, S* out) {
  using C = typename Compute<S>::type;
  constexpr int N = Block<C>::N;
  Votes<C> votes;
  TiesResult result = {0, 0};
  const bool streamed = args.stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  int64_t i = 0;
  for (; i + N <= args.n; i += N) {
    const Block<C> merged = merge_block<S, rule, plain>(args, i, votes, result);
    if (streamed)
      stream_block(merged, out + i);
    else
      store_block(merged, out + i);
  }
  if (i < args.n) {
    const int left = int(args.n - i);
    store_block(merge_block<S, rule, plain>(args, i, votes, result, left), out + i, left);
  }
  if (streamed) fence();
  result.sign_sum = votes.sum();
  return result;
}

template <class S, Rule rule>
TiesResult merge(const TiesArgs<typename Compute<S>::Key>& args, void* out) {
  const bool plain = args.base && !args.drop;
  return plain ? merge_run<S, rule, true>(args, static_cast<S*>(out))
               : merge_run<S, rule, false>(args, static_cast<S*>(out));
}

template <class S, Rule rule, class... Count>
inline void split_block(const TiesArgs<typename Compute<S>::Key>& args, int64_t i, void* const* outs,
                        Votes<typename Compute<S>::type>& votes, TiesResult& result, Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const Block<C> base = base_at<S>(args, i, count...);
  Sums<C> sums[2];
  sum_block<S, rule, false>(args, i, base, sums, count...);
  Election<C> elections[2];
  for (int h = 0; h < 2; ++h) {
    const Election<C> open = elect<rule>(args, sums[h]);
    votes.add(open);
    result.num_draws += any<C>(open.drawn & greater_key<C>(sums[h].positive_count, V::keys(0)));
    elections[h] = with_draws(open, args.zero_sign);
  }
  for (int t = 0; t < args.num_tasks; ++t) {
    const Block<C> expert = load_at<S>(args.experts[t], i, count...);
    Block<C> agreeing;
    for (int h = 0; h < 2; ++h) {
      const Entry<C> e = entry<S, rule, false>(args, t, expert.v[h], base.v[h]);
      auto agree = (e.positive & elections[h].positive) | and_not<C>(e.negative, elections[h].positive);
      if (rule == Rule::mergekit_all) agree = e.kept;
      // A NaN total elects nobody; its entries stay visible.
      const auto nan = and_not<C>(e.kept, equal(sums[h].total, sums[h].total));
      agreeing.v[h] = zero_unless<C>(agree | nan, e.summed);
    }
    store_block(agreeing, static_cast<S*>(outs[t]) + i, count...);
  }
}

template <class S, Rule rule>
TiesResult split(const TiesArgs<typename Compute<S>::Key>& args, void* const* outs) {
  using C = typename Compute<S>::type;
  constexpr int N = Block<C>::N;
  Votes<C> votes;
  TiesResult result = {0, 0};
  int64_t i = 0;
  for (; i + N <= args.n; i += N) split_block<S, rule>(args, i, outs, votes, result);
  if (i < args.n) split_block<S, rule>(args, i, outs, votes, result, int(args.n - i));
  result.sign_sum = votes.sum();
  return result;
}

template <class S>
constexpr TiesKernel<typename Compute<S>::Key> kernel() {
  return {{merge<S, Rule::paper>, merge<S, Rule::paper_max>, merge<S, Rule::mergekit>, merge<S, Rule::mergekit_all>,
           merge<S, Rule::peft>},
          {split<S, Rule::paper>, split<S, Rule::paper>, split<S, Rule::mergekit>, split<S, Rule::mergekit_all>,
           split<S, Rule::peft>}};
}

}  // namespace

const TiesKernels ties_kernels = {kernel<float>(), kernel<Half>(), kernel<BFloat16>(), kernel<double>()};

}  // namespace SK_ISA
}  // namespace sk
