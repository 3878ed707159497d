// The factors that give every trimmed task vector its L1 norm back.
#pragma once
#include "ties_element.h"

namespace sk {
namespace cuda {
namespace {

constexpr int kLanes = 16;  // running sums of a norm

struct Norms {
  double all, kept;
};

// mergekit's `rescale`: the L1 norms of every task vector and of its kept entries. Half a warp sums each slice as the
// CPU does, so that even float64 comes out the same: element i of a run in sum i % 16, and a new run at every cut.
template <class S>
__global__ void __launch_bounds__(kThreads)
    slice_norms(Scope scope, const Limit<KeyOf<ComputeOf<S>>>* limits, Norms* norms, Dtype dtype, bool drop) {
  using C = ComputeOf<S>;
  using Key = KeyOf<C>;
  const int lane = threadIdx.x % kLanes;
  const unsigned lanes = 0xFFFFu << (threadIdx.x % 32 / kLanes * kLanes);
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;  // [num_slices, num_tasks]
  if (row >= scope.num_slices * scope.num_tasks) return;
  const int task = int(row % scope.num_tasks);
  const Chunk slice = scope.slice(row / scope.num_tasks);
  const Part& part = scope.parts[slice.part];
  if (part.dtype != dtype) return;
  const S* const base = static_cast<const S*>(part.base);
  const S* const expert = static_cast<const S*>(scope.expert(slice.part, task));
  const int64_t flat = part.offset + slice.begin, flat_end = flat + slice.count;
  Norms sum = {0, 0};
  for (int64_t at = flat; at < flat_end;) {
    int64_t end = flat_end;
    for (int t = 0; t < scope.num_tasks; ++t)
      if (limits[t].cut > at && limits[t].cut < end) end = limits[t].cut;
    const Key limit = kept_above(limits[task].threshold - (at < limits[task].cut ? 1 : 0));
    double all = 0, kept = 0;
    for (int64_t i = at + lane; i < end; i += kLanes) {
      const int64_t place = i - part.offset;
      Key key = bits(to_compute(task_vector(expert[place], base ? base[place] : S(), base != nullptr))) & kMaxKey<Key>;
      if (drop && key >= kInfinityKey<Key>) key = 0;
      all += double(from_bits(key));
      kept += key > limit ? double(from_bits(key)) : 0.0;
    }
    Norms run = {0, 0};
    for (int l = 0; l < kLanes; ++l) {
      run.all += __shfl_sync(lanes, all, l, kLanes);
      run.kept += __shfl_sync(lanes, kept, l, kLanes);
    }
    sum.all += run.all;
    sum.kept += run.kept;
    at = end;
  }
  if (lane == 0) norms[row] = sum;
}

template <class S>
__global__ void set_rescales(Scope scope, const Norms* norms, ComputeOf<S>* rescales, Dtype dtype) {
  using C = ComputeOf<S>;
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;  // [num_parts, num_tasks]
  if (row >= int64_t(scope.num_parts) * scope.num_tasks) return;
  const Part& part = scope.parts[row / scope.num_tasks];
  if (part.dtype != dtype) return;
  Norms sum = {0, 0};
  for (int64_t s = 0; s < (part.numel + kSlice - 1) / kSlice; ++s) {
    const Norms& slice = norms[(part.first_slice + s) * scope.num_tasks + row % scope.num_tasks];
    sum.all += slice.all;
    sum.kept += slice.kept;
  }
  const C all = round_to<S>(C(sum.all)), kept = round_to<S>(C(sum.kept));
  const C infinity = from_bits(kInfinityKey<KeyOf<C>>);
  // A norm past the dtype's range would make mergekit's ratio NaN; the norms themselves are fine.
  const C ratio = all == infinity || kept == infinity ? C(sum.all / sum.kept) : C(double(all / kept));
  rescales[row] = all < C(1e-7) || kept < C(1e-7) ? C(1) : round_to<S>(ratio);
}

}  // namespace
}  // namespace cuda
}  // namespace sk
