// One order for sums over many elements, whatever the vectors and the threads: element i of a block of kSumBlock adds
// to sum i % kSumLanes, one after the other; then the sums, and then the blocks, are folded in halves.
#pragma once
#include <cstdint>

namespace sk {
namespace {  // kernel files include this too

constexpr int64_t kSumBlock = 32768;
constexpr int kSumLanes = 32;

// x[j] += x[j + half] until one is left.
inline double fold_halves(double* x, int64_t count) {
  if (count == 0) return 0;
  while (count > 1) {
    const int64_t half = (count + 1) / 2;
    for (int64_t j = 0; j + half < count; ++j) x[j] += x[j + half];
    count = half;
  }
  return x[0];
}

}  // namespace
}  // namespace sk
