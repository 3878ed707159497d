// What merges of tiles of elements are made of: a few thousand at a time, in the compute type, in the caches. Kernel
// files only.
#pragma once
#include <algorithm>
#include <type_traits>

#include "block_sums.h"
#include "simd/vec.h"

namespace sk {
namespace SK_ISA {
namespace {

// The elements in the compute type: where they are, or in `room`.
template <class S>
inline const typename Compute<S>::type* widened(const S* p, int n, typename Compute<S>::type* room) {
  using V = Vec<typename Compute<S>::type>;
  if constexpr (std::is_same_v<S, typename Compute<S>::type>) {
    return p;
  } else {
    int i = 0;
    for (; i + V::N <= n; i += V::N) store(load(p + i), room + i);
    if (i < n) {
      typename Compute<S>::type last[V::N];
      store(load(p + i, n - i), last);
      std::copy_n(last, n - i, room + i);
    }
    return room;
  }
}

template <class S>
inline void store_narrowed(const typename Compute<S>::type* x, int n, S* p) {
  using V = Vec<typename Compute<S>::type>;
  int i = 0;
  for (; i + V::N <= n; i += V::N) store(load(x + i), p + i);
  if (i < n) {
    S last[V::N];
    store(load(x + i, n - i), last);
    std::copy_n(last, n - i, p + i);
  }
}

// Products in the compute type, added up in kSumLanes lanes of it, element i in lane i % kSumLanes; those in double.
template <class C>
inline double dot(const C* a, const C* b, int n) {
  using V = Vec<C>;
  constexpr int kVectors = kSumLanes / V::N;
  V sums[kVectors];
  for (V& sum : sums) sum = V::set(0);
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int v = 0; v < kVectors; ++v) sums[v] = sums[v] + load(a + i + v * V::N) * load(b + i + v * V::N);
  C lanes[kSumLanes];
  for (int v = 0; v < kVectors; ++v) store(sums[v], lanes + v * V::N);
  for (int l = 0; i + l < n; ++l) lanes[l] = lanes[l] + a[i + l] * b[i + l];
  double wide[kSumLanes];
  for (int l = 0; l < kSumLanes; ++l) wide[l] = double(lanes[l]);
  return fold_halves(wide, kSumLanes);
}

}  // namespace
}  // namespace SK_ISA
}  // namespace sk
