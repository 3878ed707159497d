#include "ties_merge.h"

#include "ties_element.h"
#include "ties_rescale.h"

namespace sk {
namespace cuda {
namespace {

// Experts whose packs are under way while a thread adds up; where the sums take more registers, fewer.
template <Rule rule>
constexpr int kAhead = rule == Rule::mergekit ? 2 : 4;
constexpr unsigned kAll = 0xFFFFFFFF;

// What a block found in its chunks.
struct Votes {
  int signs = 0;
  bool drew = false;
};

// N elements of a chunk from `i` on. split: each expert's agreeing entries instead of the merge.
template <class S, Rule rule, bool split, int N>
__device__ void merge_pack(const Arguments<KeyOf<ComputeOf<S>>>& args, const Task<KeyOf<ComputeOf<S>>>* tasks,
                           const Part& part, int64_t begin, int i, int zero_sign, Votes& votes) {
  using C = ComputeOf<S>;
  using Key = KeyOf<C>;
  const int64_t at = begin + i;
  const int num_tasks = args.scope.num_tasks;
  const bool has_base = part.base != nullptr, unelected = rule == Rule::mergekit && args.divisors;
  Pack<S, N> base{};
  if (has_base) base = load_last<S, N>(part.base, at);
  // Elsewhere than in single elements, nobody's ties end within the chunk.
  const auto limit_of = [&](const Task<Key>& task) { return N == 1 && i >= task.cut ? task.limit + 1 : task.limit; };

  Sums<C> sums[N];
  for (int t = 0; t < num_tasks; t += kAhead<rule>) {
    Pack<S, N> experts[kAhead<rule>];
#pragma unroll
    for (int a = 0; a < kAhead<rule>; ++a)
      if (t + a < num_tasks)
        experts[a] = split ? load<S, N>(tasks[t + a].expert, at) : load_last<S, N>(tasks[t + a].expert, at);
#pragma unroll
    for (int a = 0; a < kAhead<rule>; ++a) {
      if (t + a >= num_tasks) break;
      const Task<Key>& task = tasks[t + a];
      const Key limit = limit_of(task);
#pragma unroll
      for (int j = 0; j < N; ++j)
        accumulate<rule>(sums[j], entry<S, rule>(args, task, limit, experts[a].v[j], base.v[j], has_base), task.weight,
                         unelected);
    }
  }

  Pack<S, N> merged;
  int signs[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Election election = elect<rule>(sums[j], args.elect_count);
    votes.signs += election.sign;
    votes.drew |= election.open && sums[j].positives() > 0;  // a draw between entries has some of either sign
    signs[j] = election.open ? zero_sign : election.sign;
    if constexpr (!split) {
      const C b = to_compute(base.v[j]);
      merged.v[j] = to_stored<S>(
          unelected ? finish_all<S>(args, sums[j].total, args.divisors[&part - args.scope.parts], b, has_base)
                    : finish<S, rule>(args, sums[j], signs[j], b, has_base));
    }
  }
  if constexpr (!split) {
    store(part.out, at, merged);
  } else {
    for (int t = 0; t < num_tasks; ++t) {
      const Pack<S, N> expert = load_last<S, N>(tasks[t].expert, at);
      const Key limit = limit_of(tasks[t]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Entry<C> e = entry<S, rule>(args, tasks[t], limit, expert.v[j], base.v[j], has_base);
        const bool agrees = unelected ? e.kept : signs[j] > 0 ? e.positive : e.negative;
        // A NaN total elects nobody; its entries stay visible.
        merged.v[j] = to_stored<S>(agrees || (e.kept && sums[j].total != sums[j].total) ? e.summed : C(0));
      }
      store(part.out, t * part.numel + at, merged);
    }
  }
}

template <class S, Rule rule, bool split>
__global__ void __launch_bounds__(kThreads, 2) merge(Arguments<KeyOf<ComputeOf<S>>> args, Dtype dtype) {
  using Key = KeyOf<ComputeOf<S>>;
  constexpr int V = kPack<S>;
  SK_DYNAMIC_SHARED(Task<Key>, tasks);
  if (args.error && args.report->nonfinite) return;
  // A drawn election takes the sign of the sum of all elected signs, known at the end only. The first launch assumes
  // plus and marks the chunks that drew; the second merges those once more where that was wrong.
  const long long sum = args.again ? args.report->sign_sum : 1;
  if (args.again && sum > 0) return;
  const int zero_sign = (sum > 0) - (sum < 0), num_tasks = args.scope.num_tasks;
  Votes votes;
  for (int64_t c = blockIdx.x; c < args.scope.num_chunks; c += gridDim.x) {
    if (args.again && !args.drew[c]) continue;
    const Chunk chunk = args.scope.chunk(c);
    const Part& part = args.scope.parts[chunk.part];
    if (part.dtype != dtype) continue;
    __syncthreads();
    bool cut_inside = false;
    for (int t = threadIdx.x; t < num_tasks; t += kThreads) {
      const Limit<Key> limit = args.limits[t];
      const int64_t cut = limit.cut - part.offset - chunk.begin, row = int64_t(chunk.part) * num_tasks + t;
      const int inside = cut <= 0 ? 0 : cut >= chunk.count ? chunk.count : int(cut);
      cut_inside |= inside > 0 && inside < chunk.count;
      const Key low = kept_above(limit.threshold - 1), high = kept_above(limit.threshold);
      // Where the clamp makes them equal there are no ties to tell apart.
      const bool whole = inside == chunk.count || low == high;
      tasks[t] = {args.scope.expert(chunk.part, t), args.weights ? args.weights[row] : 0,
                  args.rescales ? args.rescales[row] : 0, inside > 0 ? low : high,
                  whole || inside == 0 ? chunk.count : inside};
    }
    const bool packs_fit = part.aligned && (!split || part.numel % V == 0);  // in every row of a split
    const bool packs = packs_fit && !__syncthreads_or(cut_inside);
    __syncthreads();
    Votes here;
    const int packed = packs ? chunk.count / V * V : 0;
    for (int i = threadIdx.x * V; i < packed; i += kThreads * V)
      merge_pack<S, rule, split, V>(args, tasks, part, chunk.begin, i, zero_sign, here);
    for (int i = packed + threadIdx.x; i < chunk.count; i += kThreads)
      merge_pack<S, rule, split, 1>(args, tasks, part, chunk.begin, i, zero_sign, here);
    votes.signs += here.signs;
    if (here.drew && kIsPaper<rule>) args.drew[c] = 1;
  }
  if (kIsPaper<rule> && !args.again) {
    const int signs = int(__reduce_add_sync(kAll, unsigned(votes.signs)));
    if (threadIdx.x % 32 == 0 && signs != 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(&args.report->sign_sum), (unsigned long long)(long long)signs);
  }
}

// Runs body(S(), dtype) for every dtype among the tensors.
template <class Key, class Body>
void for_each_dtype(const ScopeBuilder& tensors, const Body& body) {
  if constexpr (sizeof(Key) == 8) {
    body(double(), Dtype::f64);
  } else {
    if (tensors.has(Dtype::f32)) body(float(), Dtype::f32);
    if (tensors.has(Dtype::f16)) body(half(), Dtype::f16);
    if (tensors.has(Dtype::bf16)) body(bfloat16(), Dtype::bf16);
  }
}

template <class S, Rule rule, bool split>
void launch(const Device& device, const Arguments<KeyOf<ComputeOf<S>>>& args, Dtype dtype) {
  using Key = KeyOf<ComputeOf<S>>;
  SK_LAUNCH((merge<S, rule, split>), device.blocks(args.scope.num_chunks, 8), kThreads,
            args.scope.num_tasks * sizeof(Task<Key>), device.stream, args, dtype);
}

template <class S, Rule rule>
void launch(const Device& device, const Arguments<KeyOf<ComputeOf<S>>>& args, Dtype dtype, bool split) {
  split ? launch<S, rule, true>(device, args, dtype) : launch<S, rule, false>(device, args, dtype);
}

template <class S>
void launch(const Device& device, const Arguments<KeyOf<ComputeOf<S>>>& args, Dtype dtype, Rule rule, bool split) {
  if (rule == Rule::paper_max)
    launch<S, Rule::paper_max, false>(device, args, dtype);
  else if (rule == Rule::paper)
    launch<S, Rule::paper>(device, args, dtype, split);
  else if (rule == Rule::mergekit || rule == Rule::mergekit_all)
    launch<S, Rule::mergekit>(device, args, dtype, split);
  else
    launch<S, Rule::peft>(device, args, dtype, split);
}

template <class Key>
const int* merge_tensors(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                         const MergeOptions& options, const Limit<Key>* limits) {
  using C = typename Arguments<Key>::C;
  Report* const report = device.zeros<Report>(1);
  int* const nonfinite = options.error ? &report->nonfinite : nullptr;
  const bool given = limits != nullptr;
  if (!given) limits = trim<Key>(device, tensors, scope, options.trim, nonfinite);
  if (given && options.error) look_for_nonfinite(device, tensors, scope, nonfinite);

  C* rescales = nullptr;
  if (options.rescale) {
    Norms* const norms = device.array<Norms>(scope.num_slices * scope.num_tasks);
    rescales = device.array<C>(int64_t(scope.num_parts) * scope.num_tasks);
    const auto blocks = [](int64_t threads) {
      return unsigned(std::max<int64_t>(1, (threads + kThreads - 1) / kThreads));
    };
    for_each_dtype<Key>(tensors, [&](auto s, Dtype dtype) {
      using S = decltype(s);
      SK_LAUNCH(slice_norms<S>, blocks(scope.num_slices * scope.num_tasks * kLanes), kThreads, 0, device.stream, scope,
                limits, norms, dtype, options.drop);
      SK_LAUNCH(set_rescales<S>, blocks(int64_t(scope.num_parts) * scope.num_tasks), kThreads, 0, device.stream, scope,
                norms, rescales, dtype);
    });
  }
  const auto upload = [&](const std::vector<double>& values) -> const C* {
    return values.empty() ? nullptr : device.upload(std::vector<C>(values.begin(), values.end()));
  };
  const bool paper = options.rule == Rule::paper || options.rule == Rule::paper_max;
  unsigned char* const drew = paper ? device.zeros<unsigned char>(scope.num_chunks) : nullptr;
  Arguments<Key> args{scope,
                      limits,
                      upload(options.weights),
                      rescales,
                      upload(options.divisors),
                      C(options.lam),
                      options.elect_count,
                      options.divide,
                      options.error,
                      options.drop,
                      report,
                      drew,
                      false};
  for (const bool again : {false, true}) {
    if (again && !paper) break;
    args.again = again;
    for_each_dtype<Key>(
        tensors, [&](auto s, Dtype dtype) { launch<decltype(s)>(device, args, dtype, options.rule, options.split); });
  }
  check(cudaGetLastError());
  return nonfinite;
}

}  // namespace

template <>
const int* ties_merge(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                      const MergeOptions& options, const Limit<int32_t>* limits) {
  return merge_tensors(device, tensors, scope, options, limits);
}

template <>
const int* ties_merge(const Device& device, const ScopeBuilder& tensors, const Scope& scope,
                      const MergeOptions& options, const Limit<int64_t>* limits) {
  return merge_tensors(device, tensors, scope, options, limits);
}

}  // namespace cuda
}  // namespace sk
