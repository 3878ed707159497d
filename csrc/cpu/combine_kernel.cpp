#include "combine_kernel.h"

#include <algorithm>

#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

template <class C>
constexpr int kLanes = 128 / int(sizeof(C));  // as many on every instruction set
constexpr int kProducts = 128;                // per lane and run

// Task vectors read side by side, each in one long run that prefetching can follow: as many as the registers bear.
#if defined(__AVX512F__)
constexpr int kTogether = 8;
#else
constexpr int kTogether = 4;
#endif

// Adds <grad, task_vector> of one run to out, for kTasks task vectors.
template <class S, int kTasks>
void dot(const S* grad, const void* const* task_vectors, int64_t begin, int64_t end, double* out) {
  using C = typename Compute<S>::type;
  using V = Vec<C>;
  constexpr int N = Block<C>::N, kBlocks = kLanes<C> / N;
  Block<C> sums[kTasks][kBlocks];
  for (auto& of_task : sums)
    for (Block<C>& sum : of_task) sum = {V::set(0), V::set(0)};
  const auto add = [&](int b, int64_t i, auto... count) {
    const Block<C> x = load_block(grad + i, count...);
    for (int t = 0; t < kTasks; ++t) {
      const Block<C> y = load_block(static_cast<const S*>(task_vectors[t]) + i, count...);
      for (int h = 0; h < 2; ++h) sums[t][b].v[h] = sums[t][b].v[h] + x.v[h] * y.v[h];
    }
  };
  int64_t i = begin;
  for (; i + kLanes<C> <= end; i += kLanes<C>)
    for (int b = 0; b < kBlocks; ++b) add(b, i + b * N);
  for (int b = 0; i < end; ++b, i += N) add(b, i, int(std::min<int64_t>(N, end - i)));
  for (int t = 0; t < kTasks; ++t) {
    double lanes[kLanes<C>];  // in the order of the elements
    for (int b = 0; b < kBlocks; ++b)
      for (int h = 0; h < 2; ++h)
        for (int l = 0; l < V::N; ++l)
          lanes[b * N + (kInterleaved<S> ? 2 * l + h : h * V::N + l)] = double(sums[t][b].v[h].v[l]);
    for (int half = kLanes<C> / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    out[t] += lanes[0];
  }
}

template <class S, int kTasks = kTogether>
void dots(const void* grad, const void* const* task_vectors, int num_tasks, int64_t n, double* out) {
  constexpr int64_t run = kProducts * kLanes<typename Compute<S>::type>;
  int t = 0;
  for (; t + kTasks <= num_tasks; t += kTasks) {
    for (int k = t; k < t + kTasks; ++k) out[k] = 0;
    for (int64_t i = 0; i < n; i += run)
      dot<S, kTasks>(static_cast<const S*>(grad), task_vectors + t, i, std::min(i + run, n), out + t);
  }
  if constexpr (kTasks > 1) dots<S, kTasks / 2>(grad, task_vectors + t, num_tasks - t, n, out + t);
}

}  // namespace

const DotKernels dot_kernels = {dots<float>, dots<Half>, dots<BFloat16>, dots<double>};

}  // namespace SK_ISA
}  // namespace sk
