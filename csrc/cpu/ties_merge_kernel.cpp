#include "ties_merge_kernel.h"

#include "ties_arithmetic.h"

namespace sk {
namespace SK_ISA {
namespace {

// What is found in a run, lane by lane.
template <class C>
struct Votes {
  typename Vec<C>::Key positive = Vec<C>::keys(0), negative = positive;  // elected
  typename Vec<C>::Key largest = positive;                               // of all sums, in Form::normal

  void add(const Election<C>& e) {
    positive = tally<C>(positive, e.positive);
    negative = tally<C>(negative, e.negative);
  }
  int64_t sum() const { return sum_keys<C>(positive) - sum_keys<C>(negative); }
  // Entries of the paper and of PEFT that are NaN are among either sign.
  template <Rule rule>
  void look_at(const Sums<C>& s) {
    largest = max_key<C>(largest, magnitude(s.positive - s.negative));
    if constexpr (rule == Rule::mergekit) largest = max_key<C>(largest, magnitude(s.total));
  }
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

// The bits of a block's elements in the masks of an expert; all set without masks.
inline uint32_t bits_of_block(const uint8_t* const* masks, int t, int64_t first) {
  if (!masks) return ~uint32_t(0);
  uint64_t bits;
  memcpy(&bits, masks[t] + first / 8, sizeof bits);
  return uint32_t(bits >> first % 8);
}

// As many streams as there are experts pass through one load instruction, which is more than the hardware follows.
template <class S>
constexpr size_t kPrefetchBytes = sizeof(S) == 2 ? 512 : 256;

template <class S>
inline void prefetch_block(const void* p, int64_t i) {
  const char* const ahead = static_cast<const char*>(p) + size_t(i) * sizeof(S) + kPrefetchBytes<S>;
  for (size_t line = 0; line < Block<typename Compute<S>::type>::N * sizeof(S); line += 64)
    __builtin_prefetch(ahead + line);
}

template <class S, Rule rule, Form form, class... Count>
inline void sum_block(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                      const Block<typename Compute<S>::type>& base, Sums<typename Compute<S>::type> (&sums)[2],
                      Count... count) {
  using V = Vec<typename Compute<S>::type>;
  for (int t = 0; t < args.num_tasks; ++t) {
    const auto expert = load_at<S>(args.experts[t], i, count...);
    if constexpr (sizeof...(Count) == 0) prefetch_block<S>(args.experts[t], i);
    const uint32_t bits = form == Form::masked ? bits_of_block(args.masks, t, args.first_bit + i) : 0;
    for (int h = 0; h < 2; ++h) {
      const auto allowed = form == Form::masked ? lanes_where<S>(h, bits) : V::all();
      accumulate<rule, form>(sums[h], entry<S, rule, form>(args, t, expert.v[h], base.v[h], allowed), args, t);
    }
  }
}

// Records the draws of a block that are open, having entries, under the other sign.
template <class S, Rule rule, Form form>
inline void record_draws(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                         const Sums<typename Compute<S>::type> (&sums)[2],
                         const Election<typename Compute<S>::type> (&elections)[2],
                         const typename Vec<typename Compute<S>::type>::Mask (&open)[2],
                         const Block<typename Compute<S>::type>& base, TiesResult& result) {
  using C = typename Compute<S>::type;
  constexpr int N = Block<C>::N;
  Block<C> other;
  for (int h = 0; h < 2; ++h)
    other.v[h] = finish<S, rule, form>(args, sums[h], with_draws(elections[h], -args.zero_sign), base.v[h]);
  S values[N];
  store_block(other, values);
  for (uint32_t left = elements_where<S>(open[0], open[1]); left != 0; left &= left - 1) {
    const int j = __builtin_ctz(left);
    if (result.num_draws < args.max_draws) {
      Draw& draw = args.draws[result.num_draws];
      draw.index = i + j;
      memcpy(draw.value, &values[j], sizeof(S));
    }
    ++result.num_draws;
  }
}

template <class S, Rule rule, Form form, class... Count>
inline Block<typename Compute<S>::type> merge_block(const TiesArgs<typename Compute<S>::Key>& args, int64_t i,
                                                    Votes<typename Compute<S>::type>& votes, TiesResult& result,
                                                    Count... count) {
  using C = typename Compute<S>::type;
  const Block<C> base = base_at<S>(args, i, count...);
  Sums<C> sums[2];
  sum_block<S, rule, form>(args, i, base, sums, count...);
  if constexpr (form == Form::normal)
    for (int h = 0; h < 2; ++h) votes.template look_at<rule>(sums[h]);
  Block<C> merged;
  if constexpr (!kElects<rule>) {
    for (int h = 0; h < 2; ++h) merged.v[h] = finish_all<S, rule, form>(args, sums[h], base.v[h]);
    return merged;
  }
  Election<C> elections[2];
  for (int h = 0; h < 2; ++h) {
    elections[h] = elect<rule, form>(args, sums[h]);
    if constexpr (kPaper<rule>) votes.add(elections[h]);
    merged.v[h] = finish<S, rule, form>(args, sums[h], with_draws(elections[h], args.zero_sign), base.v[h]);
  }
  if constexpr (kPaper<rule>) {
    typename Vec<C>::Mask open[2];  // a draw between entries has some of either sign
    for (int h = 0; h < 2; ++h) open[h] = greater_key<C>(sums[h].positive_count, Vec<C>::keys(0)) & elections[h].drawn;
    if (any<C>(typename Vec<C>::Mask(open[0] | open[1])))
      record_draws<S, rule, form>(args, i, sums, elections, open, base, result);
  }
  return merged;
}

template <class S, Rule rule, Form form>
TiesResult merge_run(const TiesArgs<typename Compute<S>::Key>& args, S* out) {
  using C = typename Compute<S>::type;
  constexpr int N = Block<C>::N;
  Votes<C> votes;
  TiesResult result = {0, 0};
  const bool streamed = args.stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  int64_t i = 0;
  for (; i + N <= args.n; i += N) {
    const Block<C> merged = merge_block<S, rule, form>(args, i, votes, result);
    if (streamed)
      stream_block(merged, out + i);
    else
      store_block(merged, out + i);
  }
  if (i < args.n) {
    const int left = int(args.n - i);
    store_block(merge_block<S, rule, form>(args, i, votes, result, left), out + i, left);
  }
  if (streamed) fence();
  if constexpr (form == Form::normal)
    if (max_lane<C>(votes.largest) > kLargestNormal<S>) return merge_run<S, rule, Form::plain>(args, out);
  result.sign_sum = votes.sum();
  return result;
}

template <class S, Rule rule>
constexpr bool kMayBeNormal = sizeof(S) == 2 && (rule == Rule::paper || rule == Rule::mergekit || rule == Rule::peft);

// Whether Form::normal serves: what is kept, and what it is scaled to, is far from the subnormal numbers, and what is
// dropped could be kept.
template <class S>
bool keeps_normal(const TiesArgs<typename Compute<S>::Key>& args) {
  if (!args.base || args.drop || (std::is_same_v<S, Half> && (args.weights || args.rescales))) return false;
  for (int t = 0; t < args.num_tasks; ++t) {
    float least;
    memcpy(&least, &args.limits[t], sizeof least);
    for (const float* factors : {args.rescales, args.weights})
      if (factors && factors[t] != 0 && factors[t] > -1 && factors[t] < 1) least *= __builtin_fabsf(factors[t]);
    if (!(least >= 2 * kLeastNormal<S>) || args.limits[t] > kLargestNormal<S>) return false;
  }
  return true;
}

template <class S, Rule rule>
TiesResult merge(const TiesArgs<typename Compute<S>::Key>& args, void* out) {
  if (kExact<rule> || args.masks || args.min_count > 0)
    return merge_run<S, rule, Form::masked>(args, static_cast<S*>(out));
  if constexpr (kMayBeNormal<S, rule>)
    if (keeps_normal<S>(args)) return merge_run<S, rule, Form::normal>(args, static_cast<S*>(out));
  if constexpr (!kExact<rule>)
    return args.base && !args.drop ? merge_run<S, rule, Form::plain>(args, static_cast<S*>(out))
                                   : merge_run<S, rule, Form::general>(args, static_cast<S*>(out));
}

template <class S, Rule rule, class... Count>
inline void split_block(const TiesArgs<typename Compute<S>::Key>& args, int64_t i, void* const* outs,
                        Votes<typename Compute<S>::type>& votes, TiesResult& result, Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const Block<C> base = base_at<S>(args, i, count...);
  Sums<C> sums[2];
  sum_block<S, rule, Form::general>(args, i, base, sums, count...);
  Election<C> elections[2];
  for (int h = 0; h < 2; ++h) {
    const Election<C> open = elect<rule, Form::general>(args, sums[h]);
    votes.add(open);
    result.num_draws += any<C>(open.drawn & greater_key<C>(sums[h].positive_count, V::keys(0)));
    elections[h] = with_draws(open, args.zero_sign);
  }
  for (int t = 0; t < args.num_tasks; ++t) {
    const Block<C> expert = load_at<S>(args.experts[t], i, count...);
    Block<C> agreeing;
    for (int h = 0; h < 2; ++h) {
      const Entry<C> e = entry<S, rule, Form::general>(args, t, expert.v[h], base.v[h], V::all());
      auto agree = (e.positive & elections[h].positive) | and_not<C>(e.negative, elections[h].positive);
      if (!kElects<rule>) agree = e.kept;
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
           merge<S, Rule::peft>, merge<S, Rule::exact>, merge<S, Rule::exact_all>, merge<S, Rule::magmax>},
          {split<S, Rule::paper>, split<S, Rule::paper>, split<S, Rule::mergekit>, split<S, Rule::mergekit_all>,
           split<S, Rule::peft>, split<S, Rule::exact>, split<S, Rule::exact_all>, split<S, Rule::exact_all>}};
}

}  // namespace

const TiesKernels ties_kernels = {kernel<float>(), kernel<Half>(), kernel<BFloat16>(), kernel<double>()};

}  // namespace SK_ISA
}  // namespace sk
