#include "gram_cross_kernel.h"

#include <algorithm>

#include "matmul.h"

namespace sk {
namespace SK_ISA {
namespace {

// A row in the compute type, filled up with zeros.
template <class S, class C>
inline void read_row(const S* row, int64_t width, C* to) {
  using V = Vec<typename Compute<S>::type>;
  for (int64_t i = 0; i < kStrip; i += V::N) {
    const int64_t left = width - i;
    const V x = left >= V::N ? load(row + i) : left > 0 ? load(row + i, int(left)) : V::set(0);
    if constexpr (std::is_same_v<C, typename Compute<S>::type>) {
      store(x, to + i);
    } else {
      typename Compute<S>::type lanes[V::N];
      store(x, lanes);
      for (int l = 0; l < V::N; ++l) to[i + l] = C(lanes[l]);
    }
  }
}

template <class S, class C>
void pack(const Strip<C>& strip) {
  alignas(64) C sums[kStrip] = {}, row[kStrip], times_weight[kStrip];
  for (int64_t r = 0; r < strip.rows; ++r) {
    const C weight = strip.weights ? strip.weights[r] : C(1);
    if (weight != 0) {
      read_row<S, C>(static_cast<const S*>(strip.from) + r * strip.stride, strip.width, row);
    } else {
      std::fill_n(row, kStrip, C(0));
    }
    for (int64_t i = 0; i < kStrip; ++i) times_weight[i] = strip.weights ? weight * row[i] : row[i];
    for (int64_t i = 0; i < kStrip; ++i) sums[i] += times_weight[i];
    if (strip.plain) std::copy_n(row, kStrip, strip.plain + r * kStrip);
    if (strip.weighted && strip.weighted != strip.plain) std::copy_n(times_weight, kStrip, strip.weighted + r * kStrip);
  }
  if (strip.sums)
    for (int64_t i = 0; i < strip.width; ++i) strip.sums[i] = strip.add ? strip.sums[i] + sums[i] : sums[i];
}

// Rows of b that stay in the first-level cache while all of a passes by.
template <class C>
constexpr int64_t kDepth = 24576 / (kStrip * int64_t(sizeof(C)));

constexpr int64_t kDiagonal = 16;  // rows of a product with itself that share where their columns begin

template <class C>
void multiply(const StripProduct<C>& product) {
  const Panel<C> sums = {product.scratch, kStrip};
  if (product.rows == 0) std::fill_n(product.scratch, kStrip * kStrip, C(0));
  for (int64_t first = 0; first < product.rows; first += kDepth<C>) {
    const int64_t depth = std::min(kDepth<C>, product.rows - first);
    const Scalars<C> a = {const_cast<C*>(product.a) + first * kStrip, 1, kStrip};
    const Panel<C> b = {const_cast<C*>(product.b) + first * kStrip, kStrip};
    const int64_t rows = product.upper ? kDiagonal : product.a_width;
    for (int64_t i = 0; i < product.a_width; i += rows) {
      const int64_t left = product.upper ? i : 0;
      sk::SK_ISA::multiply(a.below(i), b.right(left), sums.below(i).right(left), std::min(rows, product.a_width - i),
                           product.b_width - left, depth, first > 0);
    }
  }
  for (int64_t i = 0; i < product.a_width; ++i) {
    const C* const sum = sums.below(i).at;
    C* const out = product.out + i * product.stride;
    for (int64_t j = product.upper ? i : 0; j < product.b_width; ++j) out[j] = product.add ? out[j] + sum[j] : sum[j];
  }
}

}  // namespace

const GramCrossKernels gram_cross_kernels = {
    pack<float, float>, pack<Half, float>,      pack<BFloat16, float>, pack<double, double>, pack<float, double>,
    pack<Half, double>, pack<BFloat16, double>, multiply<float>,       multiply<double>,
};

}  // namespace SK_ISA
}  // namespace sk
