#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <optional>

#include "inputs.h"
#include "ties_merger.h"
#include "ties_one_read.h"

namespace sk {
namespace {

std::atomic<int64_t> least_for_one_read{1 << 30};

}  // namespace

int64_t one_read_from() { return least_for_one_read; }
int64_t set_one_read_from(int64_t nbytes) { return least_for_one_read.exchange(nbytes); }

namespace {

template <class Key>
void merge_scope(const Scope& scope, const TiesOptions& options, const KeepOptions& keep, const Outputs& outputs) {
  const auto merge = [&](const TiesArgs<Key>& args, size_t part, int64_t begin) {
    const TiesKernel<Key>& kernel = SK_KERNELS(ties_kernels).get<Key>(scope.parts[part].dtype);
    return kernel.merge[int(options.rule)](args, outputs.at(scope, part, begin));
  };
  const auto patch = [&](size_t part, int64_t begin, const Draw* draws, int count) {
    for (int d = 0; d < count; ++d)
      memcpy(outputs.at(scope, part, begin + draws[d].index), draws[d].value, size_t(size_of(scope.parts[part].dtype)));
  };
  Merger<Key> merger(scope, options, keep);
  if (reads_once(scope, options, keep)) {
    OneRead<Key>(scope, options, merger, outputs).run(merge, patch);
    return;
  }
  merger.find_limits();
  merger.run(kMaxDraws, merge, patch);
}

void merge_into(const std::vector<Tensor>& base, const std::vector<Tensor>& experts, const TiesOptions& options,
                const KeepOptions& keep, const std::vector<Tensor>& out) {
  const Inputs inputs(base, experts, options.density.size());
  Outputs outputs(out, base, experts, options.density.size());
  inputs.wide ? merge_scope<int64_t>(inputs.scope, options, keep, outputs)
              : merge_scope<int32_t>(inputs.scope, options, keep, outputs);
  outputs.deliver();
}

Tensor ties_merge(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density, double lam,
                  std::optional<std::vector<double>> weights, std::string semantics, std::string elect,
                  std::string reduce, bool normalize, bool rescale, std::string nonfinite,
                  std::optional<Tensor> thresholds) {
  check_one_tensor(experts, density);
  const Tensor out = torch::stable::new_empty(experts[0], experts[0].sizes());
  merge_into(
      as_list(base), experts,
      parse_ties_options(density, lam, weights, semantics, elect, reduce, normalize, rescale, nonfinite, thresholds),
      {}, {out});
  return out;
}

void ties_merge_out(std::vector<Tensor> base, std::vector<Tensor> experts, std::vector<double> density, double lam,
                    std::optional<std::vector<double>> weights, std::string semantics, std::string elect,
                    std::string reduce, bool normalize, bool rescale, std::string nonfinite,
                    std::optional<Tensor> thresholds, std::optional<std::vector<int64_t>> cuts,
                    std::optional<std::vector<std::string>> names, std::optional<std::vector<Tensor>> keep,
                    std::optional<Tensor> upper, std::optional<std::vector<int64_t>> upper_cuts,
                    std::optional<Tensor> scales, std::optional<std::vector<double>> keep_density, int64_t seed,
                    std::optional<std::vector<int64_t>> tensor_ids, std::optional<std::vector<int64_t>> task_ids,
                    int64_t min_count, std::optional<Tensor> unique_scales, std::vector<Tensor> out) {
  TiesOptions options = parse_ties_options(density, lam, weights, semantics, elect, reduce, normalize, rescale,
                                           nonfinite, thresholds, cuts, names);
  set_factors(options, scales, unique_scales, min_count, reduce);
  merge_into(base, experts, options, {keep, upper, upper_cuts, keep_density, seed, tensor_ids, task_ids}, out);
}

template <class Key>
void split_scope(const Scope& scope, const TiesOptions& options, const Tensor& out) {
  const auto targets = [&](int64_t i) {
    std::vector<void*> rows;
    for (int64_t t = 0; t < scope.num_tasks; ++t)
      rows.push_back(static_cast<char*>(out.data_ptr()) + (t * scope.numel + i) * size_of(scope.parts[0].dtype));
    return rows;
  };
  Merger<Key> merger(scope, options, {});
  merger.find_limits();
  merger.run(
      /*max_draws=*/0,
      [&](const TiesArgs<Key>& args, size_t, int64_t begin) {
        return SK_KERNELS(ties_kernels)
            .get<Key>(scope.parts[0].dtype)
            .split[int(options.rule)](args, targets(begin).data());
      },
      [](size_t, int64_t, const Draw*, int) {});  // none is recorded: wrong guesses are merged again
}

Tensor ties_split(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density,
                  std::optional<std::vector<double>> weights, std::string semantics, std::string elect, bool rescale,
                  std::string nonfinite, std::optional<Tensor> thresholds) {
  check_one_tensor(experts, density);
  const TiesOptions options =
      parse_ties_options(density, 1.0, weights, semantics, elect, "sum", true, rescale, nonfinite, thresholds);
  const Inputs inputs(as_list(base), experts, density.size());
  const Tensor out = new_stack(experts);
  ask_for_huge_pages(out);
  inputs.wide ? split_scope<int64_t>(inputs.scope, options, out) : split_scope<int32_t>(inputs.scope, options, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("ties_merge", TORCH_BOX(&ties_merge));
  m.impl("ties_merge_out", TORCH_BOX(&ties_merge_out));
  m.impl("ties_split", TORCH_BOX(&ties_split));
}

}  // namespace sk
