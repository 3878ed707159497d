#include "linear_merge_kernel.h"

#include <algorithm>

#include "vec.h"

namespace sk {
namespace SK_ISA {
namespace {

template <class S, class... Count>
inline Block<typename Compute<S>::type> merge_block(const LinearArgs<typename Compute<S>::Key>& args, int64_t i,
                                                    Count... count) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  const auto load = [&](const void* p) { return load_block(static_cast<const S*>(p) + i, count...); };
  const V zero = V::set(0);
  Block<C> base = {zero, zero}, sum = base;
  if (args.base) base = load(args.base);
  const bool subtract = args.base && !args.task_vectors;
  for (int t = 0; t < args.num_tasks; ++t) {
    const Block<C> expert = load(args.experts[t]);
    for (int h = 0; h < 2; ++h) {
      V x = subtract ? expert.v[h] - base.v[h] : expert.v[h];
      if (args.drop) x = zero_unless_finite(x);
      sum.v[h] = sum.v[h] + x * V::set(args.weights[t]);
    }
  }
  for (int h = 0; h < 2; ++h) {
    sum.v[h] = sum.v[h] / V::set(args.divisor) * V::set(args.lam);
    if (args.base) sum.v[h] = base.v[h] + sum.v[h];
  }
  return sum;
}

template <class S>
void merge(const LinearArgs<typename Compute<S>::Key>& args, void* out_) {
  constexpr int N = Block<typename Compute<S>::type>::N;
  S* out = static_cast<S*>(out_);
  // Streams begin at a line: what comes before the first one goes through the caches.
  const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(out) % 64 / sizeof(S));
  const bool streamed = args.stream && head + N <= args.n && reinterpret_cast<uintptr_t>(out + head) % 64 == 0;
  int64_t i = 0;
  while (streamed && i < head) {
    const int count = int(std::min<int64_t>(N, head - i));
    store_block(merge_block<S>(args, i, count), out + i, count);
    i += count;
  }
  for (; i + N <= args.n; i += N) {
    if (streamed)
      stream_block(merge_block<S>(args, i), out + i);
    else
      store_block(merge_block<S>(args, i), out + i);
  }
  if (i < args.n) store_block(merge_block<S>(args, i, int(args.n - i)), out + i, int(args.n - i));
  if (streamed) fence();
}

}  // namespace

const LinearKernels linear_kernels = {merge<float>, merge<Half>, merge<BFloat16>, merge<double>};

}  // namespace SK_ISA
}  // namespace sk
