#include "trim_search.h"

namespace sk {
namespace cuda {
namespace {

__global__ void count_nonfinite_values(Scope scope, Count* counts) {
  const int columns = 1 + 2 * scope.num_tasks;
  for (int64_t c = blockIdx.x; c < scope.num_chunks; c += gridDim.x) {
    const Chunk chunk = scope.chunk(c);
    const Part& part = scope.parts[chunk.part];
    const auto count_into = [&](int column, const void* base, const void* expert) {
      Part compared = part;
      compared.base = base;
      Count mine = 0;
      for (int i = threadIdx.x; i < chunk.count; i += kThreads)
        mine += part.dtype == Dtype::f64
                    ? key_at<Double>(compared, expert, chunk.begin + i, false) >= kInfinityKey<int64_t>
                    : key_at<Single>(compared, expert, chunk.begin + i, false) >= kInfinityKey<int32_t>;
      if (mine) atomicAdd(&counts[int64_t(chunk.part) * columns + column], mine);
    };
    if (part.base) count_into(0, nullptr, part.base);
    for (int t = 0; t < scope.num_tasks; ++t) {
      count_into(1 + 2 * t, nullptr, scope.expert(chunk.part, t));
      if (part.base) count_into(2 + 2 * t, part.base, scope.expert(chunk.part, t));
    }
  }
}

}  // namespace

const Count* count_nonfinite(const Device& device, const Scope& scope) {
  Count* const counts = device.zeros<Count>(int64_t(scope.num_parts) * (1 + 2 * scope.num_tasks));
  SK_LAUNCH(count_nonfinite_values, device.blocks(scope.num_chunks, 8), kThreads, 0, device.stream, scope, counts);
  check(cudaGetLastError());
  return counts;
}

}  // namespace cuda
}  // namespace sk
