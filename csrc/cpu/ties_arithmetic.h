// What an entry brings to a merge, what the sums over experts hold, and how they end: the arithmetic of every rule, for
// kernel files only (one object per ISA).
#pragma once
#include <type_traits>

#include "simd/vec.h"
#include "ties_merge_kernel.h"

namespace sk {
namespace SK_ISA {
namespace {

// One expert's entries at one vector of elements.
template <class C>
struct Entry {
  Vec<C> elected, summed;  // what the election and the merge add up
  typename Vec<C>::Mask kept, positive, negative;
};

// plain: there is a base, no entry is dropped, and only the limits trim. The tests in every inner loop would cost up to
// a third of its time. normal: plain, and what is kept is rounded to normal numbers, unless a sum says otherwise.
// masked: bits trim too, and elements may have too few entries.
enum class Form { plain, normal, general, masked };

template <Rule rule>
constexpr bool kExact = rule == Rule::exact || rule == Rule::exact_all || rule == Rule::magmax;
template <Rule rule>
constexpr bool kElects = rule != Rule::mergekit_all && rule != Rule::exact_all && rule != Rule::magmax;

template <Rule rule>
constexpr bool kPaper = rule == Rule::paper || rule == Rule::paper_max;

// Form::normal: what is kept is no less than twice the first; no sum exceeds the second, and none is NaN. Of bfloat16
// what is larger may overflow as it is rounded; float16 has no entries that are scaled, and none that exceed their sum.
template <class S>
constexpr float kLeastNormal = 0x1p-126f;
template <>
inline constexpr float kLeastNormal<Half> = 0x1p-14f;
template <class S>
constexpr int32_t kLargestNormal = 0x77000000;  // 2^111
template <>
inline constexpr int32_t kLargestNormal<Half> = 0x477FE000;  // 65504

// What the steps of a rule are rounded to.
template <class S, Rule rule>
using Rounded = std::conditional_t<kExact<rule>, typename Compute<S>::type, S>;

template <class S, Form form, class C>
inline Vec<C> rounded(Vec<C> x) {
  if constexpr (form == Form::normal)
    return round_normal<S>(x);
  else
    return round_to(x, S{});
}

template <class C>
inline Vec<C> value_of(typename Vec<C>::KeyLane key) {
  C value;
  memcpy(&value, &key, sizeof value);
  return Vec<C>::set(value);
}

// allowed: the lanes that the masks keep.
template <class S, Rule rule, Form form>
inline Entry<typename Compute<S>::type> entry(const TiesArgs<typename Compute<S>::Key>& args, int t,
                                              Vec<typename Compute<S>::type> expert,
                                              Vec<typename Compute<S>::type> base,
                                              typename Vec<typename Compute<S>::type>::Mask allowed) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  using R = Rounded<S, rule>;
  constexpr bool plain = form == Form::plain || form == Form::normal;
  V tau = plain || args.base ? rounded<S, form>(expert - base) : expert;
  if (!plain && args.drop) tau = zero_unless_finite(tau);

  Entry<C> e;
  if constexpr (form == Form::normal) {  // the limits are no NaN, and not 0
    const V limit = value_of<C>(args.limits[t]);
    e.positive = not_at_most(tau, limit);
    e.negative = not_at_most(V::set(0) - limit, tau);
  } else {
    // With its sign bit set a value is a negative key, so either test holds for one sign only; 0 never passes.
    const auto limit = V::keys(args.limits[t]);
    e.positive = greater_key<C>(bits(tau), limit);
    e.negative = greater_key<C>(flip_sign<C>(bits(tau)), limit);
  }
  if constexpr (form == Form::masked) {
    e.positive = e.positive & allowed;
    e.negative = e.negative & allowed;
  }
  e.kept = e.positive | e.negative;
  // A lane with NaN ends as NaN whatever it elects; only a count of the paper asks what the others elect there.
  if (kPaper<rule> && form != Form::normal && args.elect_count && !args.finite) {
    const auto number = equal(tau, tau);
    e.positive = e.positive & number;
    e.negative = e.negative & number;
  }
  if constexpr (kExact<rule>)
    if (args.base) tau = expert - base;
  e.elected = e.summed = tau;
  if constexpr (rule != Rule::paper && rule != Rule::paper_max && rule != Rule::peft) {
    if (args.rescales) tau = rounded<R, form>(tau * V::set(args.rescales[t]));
    if (rule == Rule::mergekit_all) tau = zero_unless<C>(e.kept, tau);
    if (args.weights) tau = rounded<R, form>(tau * V::set(args.weights[t]));
    e.elected = e.summed = tau;
    if (kElects<rule> && (args.rescales || args.weights)) {
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
  Vec<C> positive_weight = total, negative_weight = total;  // of entries that agree, where they have weights
  Vec<C> alone = total;                                     // exact_all with unique_scales
  Key positive_count = Vec<C>::keys(0), negative_count = positive_count;
  Key kept_count = positive_count;  // masked
};

template <Rule rule, Form form, class C>
inline void accumulate(Sums<C>& s, const Entry<C>& e, const TiesArgs<typename Compute<C>::Key>& args, int t) {
  if constexpr (form == Form::masked) s.kept_count = tally<C>(s.kept_count, e.kept);
  if constexpr (rule == Rule::mergekit_all) {
    s.total = s.total + e.elected;
    return;
  }
  if constexpr (rule == Rule::magmax) {  // the last of equal ones; NaN has the largest key
    const auto smaller = greater_key<C>(magnitude(s.total), magnitude(e.summed));
    s.total = select<C>(and_not<C>(e.kept, smaller), e.summed, s.total);
    return;
  }
  s.total = add_where<C>(e.kept, s.total, e.elected);
  if constexpr (rule == Rule::exact_all) {
    if (args.weights) s.positive_weight = add_where<C>(e.kept, s.positive_weight, Vec<C>::set(args.weights[t]));
    if (args.unique_scales) s.alone = add_where<C>(e.kept, s.alone, e.summed * Vec<C>::set(args.unique_scales[t]));
    return;
  }
  if constexpr (rule == Rule::paper_max) {
    s.positive = select<C>(and_not<C>(e.positive, greater(s.positive, e.summed)), e.summed, s.positive);
    s.negative = select<C>(and_not<C>(e.negative, greater(e.summed, s.negative)), e.summed, s.negative);
  } else {
    s.positive = add_where<C>(e.positive, s.positive, e.summed);
    s.negative = add_where<C>(e.negative, s.negative, e.summed);
  }
  s.positive_count = tally<C>(s.positive_count, e.positive);
  s.negative_count = tally<C>(s.negative_count, e.negative);
  if constexpr (rule == Rule::mergekit || rule == Rule::exact)
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

// But for the paper a draw elects plus. There it has no sign yet.
template <Rule rule, Form form, class C>
inline Election<C> elect(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s) {
  using V = Vec<C>;
  const V zero = V::set(0);
  const V mass = args.elect_count ? to_lanes<C>(s.positive_count) - to_lanes<C>(s.negative_count) : s.total;
  const auto positive = greater(mass, zero), negative = greater(zero, mass);
  if (rule == Rule::mergekit || rule == Rule::peft || rule == Rule::exact)
    return {and_not<C>(V::all(), negative), negative, and_not<C>(positive, positive)};
  if constexpr (form == Form::normal) return {positive, negative, equal(mass, zero)};
  return {positive, negative, and_not<C>(equal(s.total, s.total), positive | negative)};  // NaN has no draw
}

template <class C>
inline Election<C> with_draws(Election<C> e, int sign) {
  using Mask = typename Vec<C>::Mask;
  const Mask all = Vec<C>::all(), none = and_not<C>(all, all);
  e.positive = Mask(e.positive | (e.drawn & (sign > 0 ? all : none)));
  e.negative = Mask(e.negative | (e.drawn & (sign < 0 ? all : none)));
  return e;
}

// Elements with too few entries are those of the base.
template <Form form, class C>
inline Vec<C> base_unless_enough(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s, Vec<C> base,
                                 Vec<C> merged) {
  if (form != Form::masked || args.min_count < 1) return merged;
  return select<C>(greater_key<C>(Vec<C>::keys(args.min_count), s.kept_count), base, merged);
}

// Without an election: all entries, as mergekit rounds their sum, or rounded once.
template <class S, Rule rule, Form form, class C>
inline Vec<C> finish_all(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s, Vec<C> base) {
  using V = Vec<C>;
  using R = Rounded<S, rule>;
  V m = round_to(s.total, R{});
  if constexpr (rule == Rule::mergekit_all)
    if (args.divide) m = round_to(m / V::set(args.divisor), R{});
  if constexpr (rule == Rule::exact_all)
    if (args.divide) {
      const V n = args.weights ? s.positive_weight : to_lanes<C>(s.kept_count);
      m = m / select<C>(equal(n, V::set(0)), V::set(1), n);
      if (args.unique_scales) m = select<C>(greater_key<C>(s.kept_count, V::keys(1)), m, s.alone);
    }
  m = round_to(m * V::set(args.lam), R{});
  if (args.base) m = base + m;
  return base_unless_enough<form>(args, s, base, m);
}

template <class S, Rule rule, Form form, class C>
inline Vec<C> finish(const TiesArgs<typename Compute<C>::Key>& args, const Sums<C>& s, const Election<C>& sign,
                     Vec<C> base) {
  using V = Vec<C>;
  using R = Rounded<S, rule>;
  constexpr bool mergekit = rule == Rule::mergekit || rule == Rule::exact;
  // Draws without a sign sum the negative entries, as the official code does; its max multiplies by the sign, 0.
  V m = select<C>(sign.positive, s.positive, s.negative);
  if constexpr (rule == Rule::paper_max) m = zero_unless<C>(sign.positive | sign.negative, m);
  if constexpr (rule != Rule::peft) m = rounded<R, form>(m);
  if (args.divide) {
    V n = to_lanes<C>(max_key<C>(select_key<C>(sign.positive, s.positive_count, s.negative_count), V::keys(1)));
    if constexpr (mergekit)
      if (args.weights) {
        n = round_to(select<C>(sign.positive, s.positive_weight, s.negative_weight), R{});
        n = select<C>(equal(n, V::set(0)), V::set(1), n);
      }
    m = m / n;
    if constexpr (mergekit) m = round_to(m, R{});
  }
  m = m * V::set(args.lam);
  if (mergekit || rule == Rule::paper_max || (rule == Rule::paper && !args.divide)) m = round_to(m, R{});
  if (args.base) m = base + m;
  if constexpr (form == Form::normal) return m;
  // A NaN among the kept entries reaches the output whatever was elected.
  return base_unless_enough<form>(args, s, base, select<C>(equal(s.total, s.total), m, s.total));
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
