#include <torch/csrc/stable/library.h>

#include <optional>

#include "inputs.h"
#include "linear_merge_kernel.h"
#include "trim.h"

namespace sk {
namespace {

template <class Key>
void merge_scope(const Scope& scope, const std::vector<double>& weights, double lam, double divisor, bool drop,
                 const Outputs& outputs) {
  using C = typename LinearArgs<Key>::C;
  const std::vector<C> factors(weights.begin(), weights.end());
  scope.parallel([&](int64_t first, int64_t last) {
    std::vector<const void*> experts(factors.size());
    for (int64_t c = first; c < last; ++c) {
      const Chunk chunk = scope.chunk(c);
      for (size_t t = 0; t < experts.size(); ++t) experts[t] = chunk.part.expert_at(int64_t(t), chunk.begin);
      const bool stream = scope.numel * size_of(chunk.part.dtype) > kStreamBytes;
      const LinearArgs<Key> args = {chunk.part.base_at(chunk.begin),
                                    experts.data(),
                                    factors.data(),
                                    int(experts.size()),
                                    chunk.count,
                                    C(lam),
                                    C(divisor),
                                    /*task_vectors=*/false,
                                    drop,
                                    stream};
      SK_KERNELS(linear_kernels).get<Key>(chunk.part.dtype)(args, outputs.at(scope, chunk.part_index, chunk.begin));
      scope.report(chunk);
    }
  });
}

void linear_merge_out(std::vector<Tensor> base, std::vector<Tensor> experts, std::vector<double> weights, double lam,
                      double divisor, std::string nonfinite_name, std::optional<std::vector<std::string>> names,
                      std::vector<Tensor> out) {
  const NonFinite nonfinite = parse_nonfinite(nonfinite_name);
  const Inputs inputs(base, experts, weights.size());
  Outputs outputs(out, base, experts, weights.size());
  const auto merge = [&](auto key) {
    using Key = decltype(key);
    if (nonfinite == NonFinite::error) check_finite<Key>(inputs.scope, names.value_or(std::vector<std::string>()));
    merge_scope<Key>(inputs.scope, weights, lam, divisor, nonfinite == NonFinite::drop, outputs);
  };
  inputs.wide ? merge(int64_t()) : merge(int32_t());
  outputs.deliver();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("linear_merge_out", TORCH_BOX(&linear_merge_out)); }

}  // namespace sk
