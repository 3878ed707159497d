#include "steps_kernel.h"

#include <algorithm>
#include <cmath>

#include "block_sums.h"
#include "exponential.h"
#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
typedef double Doubles __attribute__((vector_size(kDoubles * 8)));

template <class C>
inline Doubles load_doubles(const C* p) {
  typedef C Lanes __attribute__((vector_size(kDoubles * sizeof(C))));
  Lanes x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Doubles);
}

// Registers hold C; where that is not what S is computed in, S is float64's way through float32, as torch converts.
template <class S, class C>
constexpr bool kNatural = sizeof(C) == sizeof(typename Compute<S>::type);

template <class S, class C>
inline void read_group(const S* p, C* x) {
  if constexpr (kNatural<S, C>) {
    for (int i = 0; i < kStepGroup; i += Vec<C>::N) store(load(p + i), x + i);
  } else {
    float narrow[kStepGroup];
    for (int i = 0; i < kStepGroup; i += Vec<float>::N) store(load(p + i), narrow + i);
    for (int i = 0; i < kStepGroup; ++i) x[i] = C(narrow[i]);
  }
}
template <class S, class C>
inline void write_group(const C* x, S* p) {
  if constexpr (kNatural<S, C>) {
    for (int i = 0; i < kStepGroup; i += Vec<C>::N) store(load(x + i), p + i);
  } else {
    float narrow[kStepGroup];
    for (int i = 0; i < kStepGroup; ++i) narrow[i] = float(x[i]);
    for (int i = 0; i < kStepGroup; i += Vec<float>::N) store(load(narrow + i), p + i);
  }
}
template <class S, class C>
void round_register(C* x, int n) {
  if constexpr (sizeof(S) < sizeof(C))
    for (int i = 0; i < n; i += kStepGroup) {
      S stored[kStepGroup];
      write_group(x + i, stored);
      read_group(stored, x + i);
    }
}

// d = f(d, a, b), rounded or not.
template <class S, bool rounds, class C, class F>
void each(C* d, const C* a, const C* b, int n, const F& f) {
  for (int i = 0; i < n; i += Vec<C>::N) {
    Vec<C> x = f(load(d + i), load(a + i), load(b + i));
    if constexpr (rounds) x = round_to(x, S{});
    store(x, d + i);
  }
}
// By numbers: what has no vector of its own is left to the compiler, which needs to know that nothing overlaps.
template <class C, class F>
void each_number(C* d, const C* a, int n, const F& f) {
  for (int i = 0; i < n; i += kStepGroup) {
    C x[kStepGroup];
    memcpy(x, a + i, sizeof x);
    for (int l = 0; l < kStepGroup; ++l) x[l] = C(f(double(x[l])));
    memcpy(d + i, x, sizeof x);
  }
}

// sums[i % lanes] += term(i), one after the other.
template <class F>
void add_up(double* sums, int64_t lanes, int n, const F& terms, int64_t first = 0) {
  for (int64_t i = first; i < n; i += lanes)
    for (int64_t l = 0; l < std::min(lanes, n - i); ++l) sums[l] += terms.number(i + l);
}
template <class Terms>
void add_terms(double* sums, int64_t lanes, int n, const Terms& terms) {
  if (lanes != kSumLanes) return add_up(sums, lanes, n, terms);
  constexpr int kVectors = kSumLanes / kDoubles;
  Doubles sum[kVectors];
  memcpy(sum, sums, sizeof sum);
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + terms.vector(i + v * kDoubles);
  memcpy(sums, sum, sizeof sum);
  add_up(sums, lanes, n, terms, i);
}
template <class C>
struct Values {
  const C* a;
  double number(int64_t i) const { return double(a[i]); }
  Doubles vector(int64_t i) const { return load_doubles(a + i); }
};
template <class C>
struct Products {
  const C *a, *b;
  double number(int64_t i) const { return double(a[i]) * double(b[i]); }
  Doubles vector(int64_t i) const { return load_doubles(a + i) * load_doubles(b + i); }
};

// One block of a program: elements `begin` to begin + count. Whole groups are computed, but nothing is read or written
// beyond the last element.
template <class S, class C>
struct Machine {
  using V = Vec<C>;

  const StepsArgs& args;
  const int64_t begin;
  const int count, n;

  Machine(const StepsArgs& args, int64_t begin, int count)
      : args(args), begin(begin), count(count), n((count + kStepGroup - 1) / kStepGroup * kStepGroup) {}

  C* at(int r) const { return static_cast<C*>(args.registers) + int64_t(r) * register_stride<C>(args.block); }
  const double* number_at(int k) const { return args.numbers + k * args.stride; }
  double* sum_at(int s) const { return args.sums + s * args.lanes; }

  void run() const {
    for (int i = 0; i < args.num_steps; ++i) run(args.steps[i]);
  }

  template <class F>
  void map(const Step& step, const F& f) const {
    C* const d = at(step.destination);
    constexpr bool rounds = kNatural<S, C> && sizeof(S) < sizeof(C);
    if (rounds && step.rounds) return each<S, rounds>(d, at(step.a), at(step.b), n, f);
    each<S, false>(d, at(step.a), at(step.b), n, f);
    if (step.rounds) round_register<S>(d, n);
  }

  void run(const Step& step) const {
    const V zero = V::set(0), one = V::set(1);
    const auto one_where = [&](typename V::Mask m) { return zero_unless<C>(m, one); };
    switch (step.code) {
      case Code::load:
        return load_input(step);
      case Code::number:
        return fill(step);
      case Code::add:
        return map(step, [](V, V a, V b) { return a + b; });
      case Code::sub:
        return map(step, [](V, V a, V b) { return a - b; });
      case Code::mul:
        return map(step, [](V, V a, V b) { return a * b; });
      case Code::div:
        return map(step, [](V, V a, V b) { return a / b; });
      case Code::fma:
        return map(step, [](V d, V a, V b) { return fused_multiply_add(a, b, d); });
      case Code::min:
        return map(step, [](V, V a, V b) { return select<C>(greater(b, a), a, select<C>(equal(a, a), b, a)); });
      case Code::max:
        return map(step, [](V, V a, V b) { return select<C>(greater(a, b), a, select<C>(equal(a, a), b, a)); });
      case Code::abs:
        return map(step, [](V, V a, V) { return absolute(a); });
      case Code::neg:
        return map(step, [](V, V a, V) { return V::set(C(-0.0)) - a; });
      case Code::sqrt:
        return map(step, [](V, V a, V) { return square_root(a); });
      case Code::exp:
        each_number(at(step.destination), at(step.a), n, exponential);
        break;
      case Code::log:
        each_number(at(step.destination), at(step.a), n, logarithm);
        break;
      case Code::gt:
        return map(step, [&](V, V a, V b) { return one_where(greater(a, b)); });
      case Code::ge:
        return map(step, [&](V, V a, V b) { return one_where(typename V::Mask(greater(a, b) | equal(a, b))); });
      case Code::eq:
        return map(step, [&](V, V a, V b) { return one_where(equal(a, b)); });
      case Code::select:
        return map(step, [&](V d, V a, V b) { return select<C>(equal(d, zero), b, a); });
      case Code::within:
        return args.by_column ? within_columns(step) : within(step);
      case Code::sum:
        return add_terms(sum_at(step.destination), args.lanes, count, Values<C>{at(step.a)});
      case Code::dot:
        return add_terms(sum_at(step.destination), args.lanes, count, Products<C>{at(step.a), at(step.b)});
      case Code::store:
        return store_output(step);
      case Code::bits:
        return store_bits(step);
    }
    if (step.rounds) round_register<S>(at(step.destination), n);
  }

  void load_input(const Step& step) const {
    const S* const p = static_cast<const S*>(args.inputs[step.a]) + begin;
    C* const d = at(step.destination);
    int i = 0;
    for (; i + kStepGroup <= count; i += kStepGroup) {
      // of many tensors side by side the hardware loses track; past the end this does nothing
      for (size_t line = 0; line < kStepGroup * sizeof(S); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(p + args.block + i) + line);
      read_group(p + i, d + i);
    }
    if (i == count) return;
    S rest[kStepGroup] = {};
    memcpy(rest, p + i, size_t(count - i) * sizeof(S));
    read_group(rest, d + i);
  }

  void store_output(const Step& step) const {
    if (args.keys) {
      memcpy(static_cast<C*>(args.outputs[step.destination]) + begin, at(step.a), size_t(count) * sizeof(C));
      return;
    }
    S* const p = static_cast<S*>(args.outputs[step.destination]) + begin;
    const bool streamed = args.stream && reinterpret_cast<uintptr_t>(p) % 64 == 0;
    for (int i = 0; i < count; i += kStepGroup) {
      alignas(64) S group[kStepGroup];
      write_group(at(step.a) + i, group);
      if (count - i < kStepGroup)
        memcpy(p + i, group, size_t(count - i) * sizeof(S));
      else if (streamed)
        stream_lines<sizeof group>(group, p + i);
      else
        memcpy(p + i, group, sizeof group);
    }
  }

  void store_bits(const Step& step) const {
    static_assert(kStepGroup == 32);  // a word
    const C* const a = at(step.a);
    uint8_t* const p = static_cast<uint8_t*>(args.outputs[step.destination]) + begin / 8;
    for (int i = 0; i < count; i += kStepGroup) {
      uint32_t zeros = 0;
      for (int l = 0; l < kStepGroup; l += V::N) zeros |= bits_of_lanes<C>(equal(load(a + i + l), V::set(0))) << l;
      const int left = std::min(count - i, kStepGroup);
      const uint32_t word = ~zeros & (~uint32_t(0) >> (kStepGroup - left));
      memcpy(p + i / 8, &word, size_t(left + 7) / 8);
    }
  }

  void fill(const Step& step) const {
    C* const d = at(step.destination);
    const double* const number = number_at(step.a);
    if (args.by_column) {
      for (int64_t i = 0; i < count; i += args.lanes)
        for (int64_t l = 0; l < std::min<int64_t>(args.lanes, count - i); ++l) d[i + l] = C(number[l]);
    } else {
      for (int i = 0; i < n; i += V::N) store(V::set(C(*number)), d + i);
    }
    if (step.rounds) round_register<S>(d, n);
  }

  void within(const Step& step) const {
    const V limit = V::set(C(*number_at(step.b)));
    const double before = *number_at(step.b + 1) - double(args.index + begin);
    const int cut = before > 0 ? int(std::ceil(std::min(before, double(n)))) : 0;  // ties of this block before it
    const C* const a = at(step.a);
    C* const d = at(step.destination);
    for (int i = 0; i < n; i += V::N) {
      const V x = load(a + i);
      auto kept = greater(x, limit);
      if (cut >= i + V::N)
        kept = typename V::Mask(kept | equal(x, limit));
      else if (cut > i)
        kept = typename V::Mask(kept | (equal(x, limit) & V::first(cut - i)));
      store(zero_unless<C>(kept, V::set(1)), d + i);
    }
  }
  void within_columns(const Step& step) const {
    const double *const limit = number_at(step.b), *const cut = number_at(step.b + 1);
    const C* const a = at(step.a);
    C* const d = at(step.destination);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t l = i % args.lanes;
      const bool tie = a[i] == C(limit[l]) && double(args.index + begin + i) < cut[l];
      d[i] = a[i] > C(limit[l]) || tie ? C(1) : C(0);
    }
  }
};

template <class S, class C>
void run(const StepsArgs& args) {
  for (int64_t i = 0; i < args.n; i += args.block)
    Machine<S, C>(args, i, int(std::min<int64_t>(args.block, args.n - i))).run();
  if (args.stream) fence();
}

}  // namespace

const StepsKernels steps_kernels = {run<float, float>,  run<Half, float>,  run<BFloat16, float>, run<double, double>,
                                    run<float, double>, run<Half, double>, run<BFloat16, double>};

}  // namespace SK_ISA
}  // namespace sk
