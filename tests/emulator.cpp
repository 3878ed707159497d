// Kernels with and without a mistake, under the emulator.
#include <cstdio>
#include <exception>

#include "emu/cuda.h"

namespace {

constexpr int kThreads = 256;

// The sum of 0 ... kThreads - 1 by halves, in shared memory.
template <bool barriers>
void sum(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = int(threadIdx.x);
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (barriers) __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = values[0];
}

void leave_one_behind() {
  if (threadIdx.x != 3) __syncwarp();
}

template <class Kernel>
int result_of(const Kernel& kernel, unsigned seed) {
  int result = 0;
  sk::emu::shuffle_threads(seed);
  SK_LAUNCH(kernel, 1, kThreads, 0, nullptr, &result);
  return result;
}

}  // namespace

int main() {
  printf("sum with barriers: %d %d\n", result_of(sum<true>, 0), result_of(sum<true>, 5));
  printf("sum without: %s\n", result_of(sum<false>, 0) == result_of(sum<false>, 5) ? "the same" : "differs");
  try {
    sk::emu::launch(1, 32, 0, leave_one_behind);
  } catch (const std::exception& error) {
    printf("a thread that never comes: %s\n", error.what());
  }
}
