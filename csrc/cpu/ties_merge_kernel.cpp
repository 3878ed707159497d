#include "ties_merge_kernel.h"

#include "vec.h"

namespace sk {
namespace SK_ISA {
namespace {

// The entry of one expert that enters the election and the sum, and where it is kept.
template <class C>
struct Entry {
  Vec<C> elected, summed;
  typename Vec<C>::Mask positive, negative, kept;
};

template <class S, Rule rule, class... Count>
inline Entry<typename Compute<S>::type> entry(const TiesArgs<typename Compute<S>::Key>& args, int t, const Vec<typename Compute<S>::type>& base,
                                              int64_t i, Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  V tau = load(static_cast<const S*>(args.experts[t]) + i, count...);
  if (args.base) tau = round_to(tau - base, S{});
  typename V::Key key = magnitude<C>(tau);
  if (args.drop) {
    const auto nonfinite = greater_key<C>(key, V::keys(kInfinityKey<typename V::KeyLane> - 1));
    key = zero_key_where<C>(nonfinite, key);
    tau = zero_unless<C>(and_not<C>(V::all(), nonfinite), tau);
  }
  Entry<C> e;
  e.kept = greater_key<C>(key, V::keys(args.limits[t]));
  if (rule == Rule::mergekit) {
    if (args.rescales) tau = round_to(tau * V::set(args.rescales[t]), S{});
    if (args.weights) tau = round_to(tau * V::set(args.weights[t]), S{});
  }
  e.elected = tau;
  e.summed = rule == Rule::peft && args.weights ? tau * V::set(args.weights[t]) : tau;
  e.positive = greater(tau, V::set(0)) & e.kept;
  e.negative = greater(V::set(0), tau) & e.kept;
  return e;
}

// Running sums over the experts, for either outcome of the election.
template <class C>
struct Sums {
  Vec<C> total, positive, negative, positive_count, negative_count;
};

template <Rule rule, class C>
inline void accumulate(Sums<C>& s, const Entry<C>& e, Vec<C> one) {
  s.total = add_where<C>(e.kept, s.total, e.elected);
  if (rule == Rule::paper_max) {
    s.positive = select<C>(and_not<C>(e.positive, greater(s.positive, e.summed)), e.summed, s.positive);
    s.negative = select<C>(and_not<C>(e.negative, greater(e.summed, s.negative)), e.summed, s.negative);
  } else {
    s.positive = add_where<C>(e.positive, s.positive, e.summed);
    s.negative = add_where<C>(e.negative, s.negative, e.summed);
  }
  s.positive_count = add_where<C>(e.positive, s.positive_count, one);
  s.negative_count = add_where<C>(e.negative, s.negative_count, one);
}

template <class C>
struct Election {
  typename Vec<C>::Mask positive, negative;  // neither: a draw that nothing decides
};

// Tallies of the elected signs, lane by lane.
template <class C>
struct Votes {
  typename Vec<C>::Key positive = Vec<C>::keys(0), negative = positive, drawn = positive;

  TiesResult result() const { return {sum_keys<C>(positive) - sum_keys<C>(negative), sum_keys<C>(drawn) != 0}; }
};

template <Rule rule, class C>
inline Election<C> elect(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s, Vec<C> positive_votes, Vec<C> negative_votes,
                         typename Vec<C>::Mask lanes, Votes<C>& votes) {
  using V = Vec<C>;
  const V zero = V::set(0), mass = args.elect_count ? positive_votes - negative_votes : s.total;
  const auto positive = greater(mass, zero), negative = greater(zero, mass);
  if (rule == Rule::mergekit || rule == Rule::peft) return {and_not<C>(V::all(), negative), negative};

  const auto draw = and_not<C>(lanes, positive | negative);
  votes.positive = tally<C>(votes.positive, positive & lanes);
  votes.negative = tally<C>(votes.negative, negative & lanes);
  votes.drawn = tally<C>(votes.drawn, draw & greater(positive_votes + negative_votes, zero));
  if (args.zero_sign > 0) return {typename V::Mask(positive | draw), negative};
  if (args.zero_sign < 0) return {positive, typename V::Mask(negative | draw)};
  return {positive, negative};
}

template <class S, Rule rule, class C>
inline Vec<C> finish(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s, const Election<C>& sign, Vec<C> base) {
  using V = Vec<C>;
  // Undecided draws sum the negative entries, as the official code does; its max multiplies by the sign, 0.
  V m = select<C>(sign.positive, s.positive, s.negative);
  if (rule == Rule::paper_max) m = zero_unless<C>(sign.positive | sign.negative, m);
  if (rule != Rule::peft) m = round_to(m, S{});
  const V lam = V::set(args.lam);
  if (args.divide) {
    V n = select<C>(sign.positive, s.positive_count, s.negative_count);
    if (rule == Rule::mergekit) n = round_to(n, S{});
    m = m / select<C>(equal(n, V::set(0)), V::set(1), n);
    if (rule == Rule::mergekit) m = round_to(m, S{});
  }
  m = m * lam;
  if (rule == Rule::mergekit || rule == Rule::paper_max || (rule == Rule::paper && !args.divide)) m = round_to(m, S{});
  if (args.base) m = base + m;
  // A NaN among the kept entries reaches the output whatever was elected.
  return select<C>(equal(s.total, s.total), m, s.total);
}

template <class S, Rule rule, class... Count>
inline Election<typename Compute<S>::type> sum_and_elect(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                                                         Vec<typename Compute<S>::type> base, Sums<typename Compute<S>::type>& s,
                                                         typename Vec<typename Compute<S>::type>::Mask lanes, Votes<typename Compute<S>::type>& votes,
                                                         Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  s = {V::set(0), V::set(0), V::set(0), V::set(0), V::set(0)};
  V positive_votes = V::set(0), negative_votes = V::set(0);
  const bool weighted = rule == Rule::mergekit && args.weights;
  for (int t = 0; t < args.num_tasks; ++t) {
    const Entry<C> e = entry<S, rule>(args, t, base, i, count...);
    accumulate<rule>(s, e, V::set(weighted ? args.weights[t] : C(1)));
    if (weighted && args.elect_count) {
      positive_votes = add_where<C>(e.positive, positive_votes, V::set(1));
      negative_votes = add_where<C>(e.negative, negative_votes, V::set(1));
    }
  }
  if (!weighted) positive_votes = s.positive_count, negative_votes = s.negative_count;
  return elect<rule>(args, s, positive_votes, negative_votes, lanes, votes);
}

template <class S, class... Count>
inline Vec<typename Compute<S>::type> load_base(const TiesArgs<typename Compute<S>::Key>& args, int64_t i, Count... count) {
  return args.base ? load(static_cast<const S*>(args.base) + i, count...) : Vec<typename Compute<S>::type>::set(0);
}

template <class S, Rule rule>
TiesResult merge(const TiesArgs<typename Compute<S>::Key>& args, void* out_) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  S* out = static_cast<S*>(out_);
  Votes<C> votes;
  Sums<C> s;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % (V::N * sizeof(S)) == 0;
  const bool streamed = args.stream && aligned;
  int64_t i = 0;
  for (; i + V::N <= args.n; i += V::N) {
    const V base = load_base<S>(args, i);
    const Election<C> sign = sum_and_elect<S, rule>(args, i, base, s, V::all(), votes);
    const V merged = finish<S, rule>(args, s, sign, base);
    if (streamed)
      stream(merged, out + i);
    else
      store(merged, out + i);
  }
  if (i < args.n) {
    const int left = int(args.n - i);
    const V base = load_base<S>(args, i, left);
    const Election<C> sign = sum_and_elect<S, rule>(args, i, base, s, V::first(left), votes, left);
    store(finish<S, rule>(args, s, sign, base), out + i, left);
  }
  if (streamed) fence();
  return votes.result();
}

template <class S, Rule rule>
TiesResult split(const TiesArgs<typename Compute<S>::Key>& args, void* const* outs) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  Votes<C> votes;
  Sums<C> s;
  const auto agreeing = [&](const Entry<C>& e, const Election<C>& sign) {
    // A NaN total elects nobody; its entries stay visible.
    const auto agree = (e.positive & sign.positive) | and_not<C>(e.negative, sign.positive);
    const auto nan = and_not<C>(e.kept, equal(s.total, s.total));
    return zero_unless<C>(agree | nan, e.summed);
  };
  int64_t i = 0;
  for (; i + V::N <= args.n; i += V::N) {
    const V base = load_base<S>(args, i);
    const Election<C> sign = sum_and_elect<S, rule>(args, i, base, s, V::all(), votes);
    for (int t = 0; t < args.num_tasks; ++t)
      store(agreeing(entry<S, rule>(args, t, base, i), sign), static_cast<S*>(outs[t]) + i);
  }
  if (i < args.n) {
    const int left = int(args.n - i);
    const V base = load_base<S>(args, i, left);
    const Election<C> sign = sum_and_elect<S, rule>(args, i, base, s, V::first(left), votes, left);
    for (int t = 0; t < args.num_tasks; ++t)
      store(agreeing(entry<S, rule>(args, t, base, i, left), sign), static_cast<S*>(outs[t]) + i, left);
  }
  return votes.result();
}

template <class S>
constexpr TiesKernel<typename Compute<S>::Key> kernel() {
  return {{merge<S, Rule::paper>, merge<S, Rule::paper_max>, merge<S, Rule::mergekit>, merge<S, Rule::peft>},
          {split<S, Rule::paper>, split<S, Rule::paper>, split<S, Rule::mergekit>, split<S, Rule::peft>}};
}

}  // namespace

const TiesKernels ties_kernels = {kernel<float>(), kernel<Half>(), kernel<BFloat16>(), kernel<double>()};

}  // namespace SK_ISA
}  // namespace sk
