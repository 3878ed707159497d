#include "trim.h"

#include <atomic>

#include "trim_bracket.h"
#include "trim_count.h"
#include "trim_cut.h"
#include "trim_descent.h"

namespace sk {
namespace cuda {
namespace {

std::atomic<bool> forced_descent{false};

template <class Space>
const Limit<typename Space::Limit>* trim_in(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                                            const TrimOptions& options, int* nonfinite) {
  using Key = typename Space::Key;
  const int tasks = scope.num_tasks;
  std::vector<Search<Key>> blank(size_t(tasks), Search<Key>{});
  for (int t = 0; t < tasks; ++t) blank[size_t(t)].keep = options.keep[size_t(t)];
  Search<Key>* const searches = device.upload(blank);
  auto* const limits = device.array<Limit<typename Space::Limit>>(tasks);
  unsigned* const samples = device.zeros<unsigned>(int64_t(tasks) * kPrefixes);
  // Twice what a bracket holds; beyond that the tensors are read again.
  const int64_t capacity = std::min(scope.numel, kSamples + scope.numel / 32);
  Key* const candidates = device.array<Key>(tasks * capacity);
  Count* const histograms = device.zeros<Count>(int64_t(tasks) * kBins);
  const unsigned all = unsigned(tasks), groups = unsigned((tasks + kGroup - 1) / kGroup);
  const unsigned surveys = unsigned((std::min(scope.numel, kSamples) + kThreads - 1) / kThreads);
  const dim3 readers(device.blocks(scope.num_chunks, 4), groups);

  if (surveys > 0)
    SK_LAUNCH(survey<Space>, dim3(surveys, all), kThreads, 0, device.stream, scope, searches, samples, options.drop);
  SK_LAUNCH(set_bracket<Space>, all, kScan, 0, device.stream, scope, searches, limits, samples, forced_descent.load());
  SK_LAUNCH(count<Space>, readers, kThreads, 0, device.stream, scope, searches, candidates, capacity, options.drop,
            nonfinite);
  const Outcome<typename Space::Limit> outcome{scope.numel, tensors.parts()[0].dtype, limits};
  const dim3 sorters(device.blocks(capacity / kChunk, 1), all);
  for (int step = 0; step * kRadixBits < Space::kBits; ++step)
    SK_LAUNCH((descend<Space, Candidates<Space>>), sorters, kThreads, 0, device.stream,
              (Candidates<Space>{candidates, capacity}), step, capacity, searches, histograms, outcome);
  const dim3 rereaders(device.blocks(scope.num_chunks, 8), all);
  for (int step = 0; step * kRadixBits < Space::kBits; ++step)
    SK_LAUNCH((descend<Space, Tensors<Space>>), rereaders, kThreads, 0, device.stream,
              (Tensors<Space>{scope, options.drop}), step, capacity, searches, histograms, outcome);
  if (!options.all_ties) {
    unsigned* const ties = device.zeros<unsigned>(tasks * scope.num_chunks);
    SK_LAUNCH(count_ties<Space>, rereaders, kThreads, 0, device.stream, scope, searches, ties, options.drop);
    SK_LAUNCH(find_cut<Space>, all, kThreads, 0, device.stream, scope, searches, ties, limits, options.drop);
  }
  check(cudaGetLastError());
  return limits;
}

template <class Key>
__global__ void split_limits(const Limit<Key>* limits, int num_tasks, Key* thresholds, int64_t* cuts) {
  for (int t = threadIdx.x; t < num_tasks; t += kThreads) {
    thresholds[t] = limits[t].threshold;
    cuts[t] = limits[t].cut;
  }
}

}  // namespace

template <>
const Limit<int32_t>* trim(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                           const TrimOptions& options, int* nonfinite) {
  return tensors.is_narrow() ? trim_in<Narrow>(device, tensors, scope, options, nonfinite)
                             : trim_in<Single>(device, tensors, scope, options, nonfinite);
}

template <>
const Limit<int64_t>* trim(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                           const TrimOptions& options, int* nonfinite) {
  return trim_in<Double>(device, tensors, scope, options, nonfinite);
}

template <class Key>
void take_apart(const Device& device, const Limit<Key>* limits, int num_tasks, Key* thresholds, int64_t* cuts) {
  SK_LAUNCH(split_limits<Key>, 1, kThreads, 0, device.stream, limits, num_tasks, thresholds, cuts);
  check(cudaGetLastError());
}
template void take_apart(const Device&, const Limit<int32_t>*, int, int32_t*, int64_t*);
template void take_apart(const Device&, const Limit<int64_t>*, int, int64_t*, int64_t*);

void force_descent(bool on) { forced_descent = on; }

void look_for_nonfinite(const Device& device, const ScopeBuilder& tensors, const Scope& scope, int* nonfinite) {
  const auto look = [&](auto space) {
    using Space = decltype(space);
    using Key = typename Space::Key;
    Search<Key> nothing{};
    nothing.lo = nothing.hi = nothing.peak = kMaxKey<Key>;
    Search<Key>* const searches = device.upload(std::vector<Search<Key>>(size_t(scope.num_tasks), nothing));
    const dim3 readers(device.blocks(scope.num_chunks, 4), unsigned((scope.num_tasks + kGroup - 1) / kGroup));
    SK_LAUNCH(count<Space>, readers, kThreads, 0, device.stream, scope, searches, static_cast<Key*>(nullptr),
              int64_t(0), false, nonfinite);
  };
  if (tensors.is_wide())
    look(Double());
  else if (tensors.is_narrow())
    look(Narrow());
  else
    look(Single());
  check(cudaGetLastError());
}

}  // namespace cuda
}  // namespace sk
