#include "representation_loss_kernel.h"

#include <limits>

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

// Running sums, whatever the vector width: element i always lands in sum i % kSums.
constexpr int kSums = 32;
// Elements after which they move on to double: 16 additions in float32 lose less than 1e-6 of a sum.
constexpr int kFold = 16 * kSums;

// Adds abs(features - targets) of kSums elements and leaves the differences.
template <class S, class C>
inline void add(const S* features, const S* targets, Vec<C>* sums, C* differences) {
  for (int j = 0; j < kSums; j += Vec<C>::N) {
    const Vec<C> x = load(features + j) - load(targets + j);
    sums[j / Vec<C>::N] = sums[j / Vec<C>::N] + absolute(x);
    if (differences) store(x, differences + j);
  }
}

template <class S, bool with_signs>
double forward(const S* features, const S* targets, int64_t n, int8_t* signs) {
  using C = typename Compute<S>::type;
  C differences[kFold];
  double totals[kSums] = {};
  for (int64_t begin = 0; begin < n; begin += kFold) {
    const int count = n - begin < kFold ? int(n - begin) : kFold;
    Vec<C> sums[kSums / Vec<C>::N];
    for (auto& sum : sums) sum = Vec<C>::set(0);
    int i = 0;
    for (; i + kSums <= count; i += kSums)
      add(features + begin + i, targets + begin + i, sums, with_signs ? differences + i : nullptr);
    if (i < count) {
      S last_features[kSums] = {}, last_targets[kSums] = {};
      memcpy(last_features, features + begin + i, size_t(count - i) * sizeof(S));
      memcpy(last_targets, targets + begin + i, size_t(count - i) * sizeof(S));
      add(last_features, last_targets, sums, with_signs ? differences + i : nullptr);
    }
    C lanes[kSums];
    memcpy(lanes, sums, sizeof lanes);
    for (int j = 0; j < kSums; ++j) totals[j] += double(lanes[j]);
    if constexpr (with_signs)
      for (int j = 0; j < count; ++j) {
        const C x = differences[j];
        signs[begin + j] = int8_t((x > 0) + (x >= 0) + (x == x) + kNanSign);
      }
  }
  double total = 0;
  for (const double lane : totals) total += lane;
  return total;
}

template <class S>
double forward(const void* features_, const void* targets_, int64_t n, int8_t* signs) {
  const S* features = static_cast<const S*>(features_);
  const S* targets = static_cast<const S*>(targets_);
  return signs ? forward<S, true>(features, targets, n, signs) : forward<S, false>(features, targets, n, nullptr);
}

template <class S>
inline auto stored_bits(typename Compute<S>::type x) {
  using V = Vec<typename Compute<S>::type>;
  std::conditional_t<sizeof(S) == 2, uint16_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>> bits;
  S lanes[V::N];
  store(V::set(x), lanes);
  memcpy(&bits, lanes, sizeof bits);
  return bits;
}

// A gradient has four values at most: each is rounded once and copied as bits.
template <class S>
void backward(const int8_t* signs, int64_t n, typename Compute<S>::type scale, bool stream, void* gradient_) {
  using C = typename Compute<S>::type;
  constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
  if (scale != scale) scale = kNaN;  // of other bits it could round to a number
  const auto plus = stored_bits<S>(scale), zero = stored_bits<S>(scale * 0), minus = stored_bits<S>(-scale),
             nan = stored_bits<S>(kNaN);
  S* gradient = static_cast<S*>(gradient_);
  const bool streamed = stream && reinterpret_cast<uintptr_t>(gradient) % 64 == 0;
  alignas(64) std::remove_const_t<decltype(nan)> lines[kFold];
  for (int64_t begin = 0; begin < n; begin += kFold) {
    const int count = n - begin < kFold ? int(n - begin) : kFold;
    for (int j = 0; j < count; ++j) {
      const int8_t sign = signs[begin + j];
      lines[j] = sign == 0 ? zero : sign == 1 ? plus : sign == -1 ? minus : nan;
    }
    if (streamed && count == kFold)
      stream_lines<sizeof lines>(lines, gradient + begin);
    else
      memcpy(gradient + begin, lines, size_t(count) * sizeof(S));
  }
  if (streamed) fence();
}

template <class S>
constexpr RepresentationLossKernel<typename Compute<S>::Key> kernel() {
  return {forward<S>, backward<S>};
}

}  // namespace

const RepresentationLossKernels representation_loss_kernels = {kernel<float>(), kernel<Half>(), kernel<BFloat16>(),
                                                               kernel<double>()};

}  // namespace SK_ISA
}  // namespace sk
