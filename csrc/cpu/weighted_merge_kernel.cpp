#include "weighted_merge_kernel.h"

#include <algorithm>

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

template <class S>
using BlockOf = Block<typename Compute<S>::type>;

// In the order of the elements, whatever the dtype, so that tensors of two dtypes fit.
template <class S>
inline BlockOf<S> load_elements(const S* p) {
  return {load(p), load(p + Vec<typename Compute<S>::type>::N)};
}
template <class S>
inline BlockOf<S> load_elements(const S* p, int count) {
  S full[BlockOf<S>::N] = {};
  memcpy(full, p, size_t(count) * sizeof(S));
  return load_elements(full);
}
template <class S>
inline void store_elements(BlockOf<S> x, S* p, bool stream) {
  alignas(64) S full[BlockOf<S>::N];
  S* const to = stream ? full : p;
  store(x.v[0], to);
  store(x.v[1], to + Vec<typename Compute<S>::type>::N);
  if (stream) stream_lines<sizeof full>(full, p);
}
template <class S>
inline void store_elements(BlockOf<S> x, S* p, bool, int count) {
  S full[BlockOf<S>::N];
  store_elements(x, full, false);
  memcpy(p, full, size_t(count) * sizeof(S));
}

// What is read a kibibyte further on: of many tensors side by side the hardware loses track. Past the end it does
// nothing.
template <class S>
inline void prefetch_block(const S* p) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(p) + 1024;
  for (size_t line = 0; line < sizeof(S) * BlockOf<S>::N; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
}

// Blocks of n elements, from a place where `out` begins a line if they are to be streamed past the caches:
// each(i, stream), or each(i, stream, count) of fewer elements than a block has.
template <class S, class Each>
inline void for_blocks(int64_t n, const S* out, bool stream, const Each& each) {
  constexpr int N = BlockOf<S>::N;
  const int64_t head = int64_t((-reinterpret_cast<uintptr_t>(out) % 64) / sizeof(S));
  const bool streamed = stream && head + N <= n;
  int64_t i = 0;
  while (streamed && i < head) {
    const int count = int(std::min<int64_t>(N, head - i));
    each(i, false, count);
    i += count;
  }
  for (; i + N <= n; i += N) each(i, streamed);
  if (i < n) each(i, false, int(n - i));
  if (streamed) fence();
}

template <class S>
constexpr typename Compute<S>::Key kInfinityStored = kInfinityKey<typename Compute<S>::Key>;
template <>
inline constexpr int32_t kInfinityStored<Half> = 0x477FF000;  // half a step beyond 65504
template <>
inline constexpr int32_t kInfinityStored<BFloat16> = 0x7F7F8000;

// S: of the experts, I: of the importance.
template <class S, class I>
Amiss mean(const MeanArgs<typename Compute<S>::Key>& args, void* out_) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  S* const out = static_cast<S*>(out_);
  const V zero = V::set(0), floor = V::set(args.floor);
  V lowest = zero;
  auto largest = V::keys(0), largest_importance = V::keys(0);
  for_blocks<S>(args.n, out, args.stream, [&](int64_t i, bool stream, auto... count) {
    const auto read = [&](auto* p) {
      prefetch_block(p + i);
      return load_elements(p + i, count...);
    };
    Block<C> base = {zero, zero}, total = base, mass = base;
    if (args.base) base = read(static_cast<const S*>(args.base));
    for (int t = 0; t < args.num_tasks; ++t) {
      const Block<C> expert = read(static_cast<const S*>(args.experts[t]));
      const Block<C> given = read(static_cast<const I*>(args.importance[t]));
      const V weight = V::set(args.weights[t]);
      for (int h = 0; h < 2; ++h) {
        V x = expert.v[h];
        const V f = given.v[h];
        if (args.base) x = x - base.v[h];
        if (args.drop) x = zero_unless_finite(x);
        largest = max_key<C>(largest, magnitude(x));
        largest_importance = max_key<C>(largest_importance, magnitude(f));
        lowest = select<C>(greater(lowest, f), f, lowest);
        const V certainty = select<C>(greater(floor, f), floor, f) * weight;
        mass.v[h] = mass.v[h] + certainty;
        total.v[h] = total.v[h] + x * certainty;
      }
    }
    for (int h = 0; h < 2; ++h) {
      total.v[h] = total.v[h] / mass.v[h];
      if (args.base) total.v[h] = base.v[h] + total.v[h];
    }
    store_elements<S>(total, out + i, stream, count...);
  });
  return {max_lane<C>(largest) >= kInfinityStored<S>,
          max_lane<C>(largest_importance) >= kInfinityKey<typename V::KeyLane> || any<C>(greater(zero, lowest))};
}

// Lanes as integers, with the operators of the compiler whatever a vector is.
template <class C>
struct Integers {
  using Lane = typename Compute<C>::Key;
  using Key = typename Vec<C>::Key;
  typedef Lane Type __attribute__((vector_size(sizeof(Key))));
  typedef std::make_unsigned_t<Lane> Unsigned __attribute__((vector_size(sizeof(Key))));

  static Type of(Vec<C> x) { return (Type)bits(x); }
  static Vec<C> number(Type x) {
    Vec<C> number;
    memcpy(&number, &x, sizeof x);
    return number;
  }
};

// e^(n (q - 1)) is 2^(n log2(e) (q - 1)); and tanh is odd. Polynomials of the least relative error: 3e-9 and 2e-17 of
// 2^x for |x| <= 1/2, 5e-8 and 1e-17 of tanh(x) / x in powers of x^2 for |x| <= 1.
template <class C>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float kToInteger = 0x1.8p23f;  // added to a small number it leaves the nearest integer in its bits
  static constexpr float kLeastPower = -100;
  static constexpr int kFraction = 23;  // bits
  static constexpr float kPower[] = {1.0f,          0.69314714f,   0.24022652f, 0.0555031051f,
                                     0.0096176929f, 0.0013406643f, 0.000155946f};
  static constexpr float kTanh[] = {0.9999999502408815f,   -0.3333283915359491f,  0.13325204077205186f,
                                    -0.05345702954900354f, 0.020289980320438973f, -0.006203378982082121f,
                                    0.0010410225856812554f};
};
template <>
struct Constants<double> {
  static constexpr double kToInteger = 0x1.8p52;
  static constexpr double kLeastPower = -900;
  static constexpr int kFraction = 52;
  static constexpr double kPower[] = {1.0,
                                      0.6931471805599457,
                                      0.24022650695910097,
                                      0.05550410866479039,
                                      0.009618129107607003,
                                      0.0013333558153439677,
                                      0.00015403530441571379,
                                      1.5252727385427634e-05,
                                      1.3215442675797239e-06,
                                      1.0180647576596453e-07,
                                      7.072570320758415e-09,
                                      4.078082536086186e-10};
  static constexpr double kTanh[] = {1.0,
                                     -0.3333333333333275,
                                     0.1333333333328331,
                                     -0.05396825395126731,
                                     0.021869488232283487,
                                     -0.0088632322305167,
                                     0.003592104412747129,
                                     -0.0014557168199575857,
                                     0.000589606483114914,
                                     -0.00023801988111959738,
                                     9.473391033344001e-05,
                                     -3.605142310911897e-05,
                                     1.2315996648045483e-05,
                                     -3.4075610303484106e-06,
                                     6.510350938367012e-07,
                                     -6.224696089668405e-08};
};
constexpr double kLog2E = 1.44269504088896338700;

template <class C, int size>
inline Vec<C> polynomial(const Vec<C> (&coefficients)[size], Vec<C> x) {
  Vec<C> sum = coefficients[size - 1];
  for (int k = size - 2; k >= 0; --k) sum = sum * x + coefficients[k];
  return sum;
}
template <class C, int size>
inline Vec<C> polynomial(const C (&coefficients)[size], Vec<C> x) {
  Vec<C> sum = Vec<C>::set(coefficients[size - 1]);
  for (int k = size - 2; k >= 0; --k) sum = sum * x + Vec<C>::set(coefficients[k]);
  return sum;
}

// 2^y; as 2^kLeastPower below that and for NaN.
template <class C>
inline Vec<C> power_of_two(Vec<C> y) {
  using V = Vec<C>;
  using I = Integers<C>;
  const V least = V::set(Constants<C>::kLeastPower), to_integer = V::set(Constants<C>::kToInteger);
  y = select<C>(greater(y, least), y, least);
  const V shifted = y + to_integer;
  const V p = polynomial<C>(Constants<C>::kPower, y - (shifted - to_integer));
  const auto exponent = (typename I::Unsigned)I::of(shifted) << Constants<C>::kFraction;  // no other bit is left
  return I::number((typename I::Type)((typename I::Unsigned)I::of(p) + exponent));
}

// Of any number: from 1 on by the power of two, which would cancel below.
template <class C>
inline Vec<C> tanh(Vec<C> x) {
  using V = Vec<C>;
  const V one = V::set(1), most = V::set(60), magnitude = absolute(x);
  const V bounded = select<C>(greater(magnitude, most), most, magnitude);
  const V far = one - V::set(2) / (power_of_two<C>(bounded * V::set(C(2 * kLog2E))) + one);
  const V zero = V::set(0), signed_far = select<C>(greater(zero, x), zero - far, far);
  return select<C>(greater(magnitude, one), signed_far, x * polynomial<C>(Constants<C>::kTanh, x * x));
}

// What is written down of every expert between the two passes over experts: s, or where agreement is with the sum, s
// and the change itself.
constexpr int kNotes = 3;

template <class C>
inline Vec<C> with_sign_of(Vec<C> sign, Vec<C> magnitude) {
  using I = Integers<C>;
  return I::number(I::of(magnitude) | (I::of(sign) & ~(I::of(sign) & kMaxKey<typename I::Lane>)));
}

// scores(t, h, score) of vector h of every expert's block, once change(t, h, x, a) was called with its task vector and
// that one's clipped magnitude.
template <class S, Inter inter, class Change, class Use, class... Count>
inline void for_scores(const ScoreArgs<typename Compute<S>::Key>& args, Block<typename Compute<S>::type> base,
                       int64_t i, const Change& change, const Use& use, Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  constexpr int kTerms = inter == Inter::paper ? int(std::size(Constants<C>::kTanh)) : 1, N = V::N;
  const V one = V::set(1);
  V sums[2][kTerms];
  for (auto& of_half : sums)
    for (V& sum : of_half) sum = V::set(0);
  for (int t = 0; t < args.num_tasks; ++t) {
    const S* const expert = static_cast<const S*>(args.experts[t]) + i;
    prefetch_block(expert);
    const Block<C> read = load_elements(expert, count...);
    const V low = V::set(args.clipping[t].low), high = V::set(args.clipping[t].high),
            range = V::set(args.clipping[t].range);
    C* const notes = args.scratch + t * kScratch;
    for (int h = 0; h < 2; ++h) {
      V x = read.v[h] - base.v[h];
      if (args.drop) x = zero_unless_finite(x);
      V a = absolute(x);
      a = select<C>(greater(low, a), low, a);
      a = select<C>(greater(a, high), high, a);
      change(t, h, x, a);
      const V s = with_sign_of<C>(x, (a - low) / range);
      store(s, notes + h * N);
      if constexpr (inter == Inter::paper) {
        const V square = s * s;
        V power = s;
        for (int k = 0; k < kTerms; ++k) {
          if (k) power = power * square;
          sums[h][k] = sums[h][k] + power;
        }
      } else {
        store(x, notes + (2 + h) * N);
        sums[h][0] = sums[h][0] + (inter == Inter::half ? s : x);
      }
    }
  }
  if constexpr (inter == Inter::paper)
    for (auto& of_half : sums)
      for (int k = 0; k < kTerms; ++k) of_half[k] = of_half[k] * V::set(Constants<C>::kTanh[k]);
  const V rate = V::set(C(double(args.num_tasks) * kLog2E));
  for (int t = 0; t < args.num_tasks; ++t) {
    const C* const notes = args.scratch + t * kScratch;
    for (int h = 0; h < 2; ++h) {
      const V s = load(notes + h * N), square = s * s;
      V agreement;
      if constexpr (inter == Inter::paper)
        agreement = s * polynomial<C>(sums[h], square);
      else
        agreement = tanh<C>(load(notes + (2 + h) * N) * sums[h][0]);
      use(t, h, power_of_two<C>((square - one) * rate) * agreement);
    }
  }
}

template <class C>
inline typename Integers<C>::Type key_of_score(Vec<C> score) {
  using I = Integers<C>;
  using Lane = typename I::Lane;
  const typename I::Type signed_bits = I::of(score), zero = {};
  typename I::Type above = (signed_bits & kMaxKey<Lane>)-kLeastScore<Lane>;
  above = (above > 0) & (above < kMiddleKey<Lane>) ? above : zero;
  return signed_bits < 0 ? kMiddleKey<Lane> - above : kMiddleKey<Lane> + above;
}

template <class S, Inter inter>
void score_keys(const ScoreArgs<typename Compute<S>::Key>& args, typename Compute<S>::Key* keys, int64_t stride) {
  using C = typename Compute<S>::type;
  const auto block = [&](int64_t i, auto... count) {
    Block<C> base = {Vec<C>::set(0), Vec<C>::set(0)};
    if (args.base) base = load_elements(static_cast<const S*>(args.base) + i, count...);
    for_scores<S, inter>(
        args, base, i, [](int, int, Vec<C>, Vec<C>) {},
        [&](int t, int h, Vec<C> score) {
          const auto key = key_of_score<C>(score);
          memcpy(keys + t * stride + i + h * Vec<C>::N, &key, sizeof key);
        },
        count...);
  };
  int64_t i = 0;
  for (; i + Block<C>::N <= args.n; i += Block<C>::N) block(i);
  if (i < args.n) block(i, int(args.n - i));
}

template <class S, Inter inter>
void score_merge(const ScoreArgs<typename Compute<S>::Key>& args, const Live<typename Compute<S>::type>* live,
                 bool stream, void* out_) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  S* const out = static_cast<S*>(out_);
  const V zero = V::set(0), least = V::set(C(1e-12));
  for_blocks<S>(args.n, out, stream, [&](int64_t i, bool streamed, auto... count) {
    Block<C> base = {zero, zero}, total = base, mass = base;
    if (args.base) base = load_elements(static_cast<const S*>(args.base) + i, count...);
    const auto note = [&](int t, int h) { return args.scratch + t * kScratch + (4 + h) * V::N; };
    for_scores<S, inter>(
        args, base, i,
        [&](int t, int h, V x, V a) { store(select<C>(equal(x, zero), zero, with_sign_of<C>(x, a)), note(t, h)); },
        [&](int t, int h, V score) {
          const V threshold = V::set(live[t].threshold);
          const V weight = select<C>(greater(score, threshold), score - threshold, zero) / V::set(live[t].height);
          mass.v[h] = mass.v[h] + weight;
          total.v[h] = total.v[h] + weight * V::set(live[t].factor) * load(note(t, h));
        },
        count...);
    for (int h = 0; h < 2; ++h)
      total.v[h] = base.v[h] + total.v[h] / select<C>(greater(mass.v[h], least), mass.v[h], least);
    store_elements<S>(total, out + i, streamed, count...);
  });
}

template <class S>
void keys_of(const ScoreArgs<typename Compute<S>::Key>& args, typename Compute<S>::Key* keys, int64_t stride) {
  if (args.inter == Inter::paper) return score_keys<S, Inter::paper>(args, keys, stride);
  args.inter == Inter::half ? score_keys<S, Inter::half>(args, keys, stride)
                            : score_keys<S, Inter::raw>(args, keys, stride);
}
template <class S>
void merge_by_score(const ScoreArgs<typename Compute<S>::Key>& args, const Live<typename Compute<S>::type>* live,
                    bool stream, void* out) {
  if (args.inter == Inter::paper) return score_merge<S, Inter::paper>(args, live, stream, out);
  args.inter == Inter::half ? score_merge<S, Inter::half>(args, live, stream, out)
                            : score_merge<S, Inter::raw>(args, live, stream, out);
}

template <class S>
constexpr ScoreKernel<typename Compute<S>::Key> scores() {
  return {keys_of<S>, merge_by_score<S>};
}

}  // namespace

const WeightedMergeKernels weighted_merge_kernels = {
    {mean<float, float>, mean<Half, Half>, mean<BFloat16, BFloat16>, mean<double, double>},
    {mean<float, float>, mean<Half, float>, mean<BFloat16, float>, mean<double, double>},
    {scores<float>(), scores<Half>(), scores<BFloat16>(), scores<double>()}};

}  // namespace SK_ISA
}  // namespace sk
