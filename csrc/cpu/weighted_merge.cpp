#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "../trim_options.h"
#include "finite.h"
#include "inputs.h"
#include "weighted_merge_kernel.h"

namespace sk {
namespace {

// Contiguous and alive, in the order of the experts.
struct Importance {
  std::vector<Tensor> alive;
  std::vector<char> is_wide;  // of every tensor that is merged: in the compute type

  Importance(const std::vector<Tensor>& importance, const std::vector<Tensor>& experts, size_t num_tasks) {
    require(importance.size() == experts.size(), "importance must be one tensor for every expert and merged tensor (",
            experts.size(), "), got ", importance.size());
    for (size_t i = 0; i < importance.size(); ++i) {
      const Tensor &given = importance[i], &first = importance[i / num_tasks * num_tasks];
      const ScalarType stored = experts[i].scalar_type(), dtype = given.scalar_type();
      const bool wide = dtype == (stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
      require(given.is_cpu(), "importance must be on the CPU like every other tensor, got another device");
      require(has_shape(given, experts[i].sizes()), "importance must have the shape of the experts, got another");
      require((wide || dtype == stored) && dtype == first.scalar_type(),
              "importance must have the dtype of the experts or the one that is computed in, got another");
      alive.push_back(torch::stable::contiguous(given));
      if (i % num_tasks == 0) is_wide.push_back(wide);
    }
  }

  const char* at(size_t i, int64_t element) const {
    return static_cast<const char*>(alive[i].data_ptr()) + element * alive[i].element_size();
  }
};

// How many numbers are negative, NaN or infinite, by their bits.
template <class Bits>
int64_t count_amiss(const void* data, int64_t n, Bits infinity) {
  constexpr Bits kSign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  const Bits* const bits = static_cast<const Bits*>(data);
  return std::count_if(bits, bits + n, [&](Bits x) { return x > kSign || Bits(x & ~kSign) >= infinity; });
}
int64_t count_amiss(const Tensor& t) {
  switch (dtype_of(t, "importance")) {
    case Dtype::f32:
      return count_amiss<uint32_t>(t.data_ptr(), t.numel(), 0x7F800000);
    case Dtype::f16:
      return count_amiss<uint16_t>(t.data_ptr(), t.numel(), 0x7C00);
    case Dtype::bf16:
      return count_amiss<uint16_t>(t.data_ptr(), t.numel(), 0x7F80);
    default:
      return count_amiss<uint64_t>(t.data_ptr(), t.numel(), 0x7FF0000000000000);
  }
}

template <class Key>
void merge(const Inputs& inputs, const Importance& importance, const std::vector<double>& weights, double floor,
           NonFinite nonfinite, const std::vector<std::string>& names, const std::string& called,
           const Outputs& outputs) {
  using C = typename MeanArgs<Key>::C;
  const Scope& scope = inputs.scope;
  const std::vector<C> factors(weights.begin(), weights.end());
  std::atomic<bool> experts_amiss{false}, importance_amiss{false};
  scope.parallel([&](int64_t first, int64_t last) {
    std::vector<const void*> experts(factors.size()), given(factors.size());
    for (int64_t c = first; c < last; ++c) {
      const Chunk chunk = scope.chunk(c);
      const size_t p = chunk.part_index;
      for (size_t t = 0; t < factors.size(); ++t) {
        experts[t] = chunk.part.expert_at(int64_t(t), chunk.begin);
        given[t] = importance.at(p * factors.size() + t, chunk.begin);
      }
      MeanArgs<Key> args{};
      args.base = chunk.part.base_at(chunk.begin);
      args.experts = experts.data();
      args.importance = given.data();
      args.weights = factors.data();
      args.floor = C(floor);
      args.num_tasks = int(factors.size());
      args.n = chunk.count;
      args.drop = nonfinite == NonFinite::drop;
      args.stream = scope.numel * size_of(chunk.part.dtype) > kStreamBytes;
      const WeightedMergeKernels& kernels = SK_KERNELS(weighted_merge_kernels);
      const auto& of_importance = importance.is_wide[p] ? kernels.mean_wide : kernels.mean;
      const Amiss amiss = of_importance.get<Key>(chunk.part.dtype)(args, outputs.at(scope, p, chunk.begin));
      if (amiss.experts) experts_amiss.store(true, std::memory_order_relaxed);
      if (amiss.importance) importance_amiss.store(true, std::memory_order_relaxed);
      scope.report(chunk);
      bytes_read.fetch_add(
          int64_t(factors.size()) * chunk.count * int64_t(importance.alive[p * factors.size()].element_size()),
          std::memory_order_relaxed);
    }
  });
  if (experts_amiss && nonfinite == NonFinite::error) check_finite<Key>(scope, names);
  for (size_t i = 0; importance_amiss && i < importance.alive.size(); ++i) {
    const int64_t count = count_amiss(importance.alive[i]);
    const size_t part = i / factors.size();
    require(count == 0, called, "[", i % factors.size(), "] must be finite and 0 or greater, got ", count,
            " other values", part < names.size() ? " in tensor '" + names[part] + "'" : "");
  }
}

void weighted_merge_out(std::vector<Tensor> base, std::vector<Tensor> experts, std::vector<Tensor> importance,
                        std::vector<double> weights, double floor, std::string nonfinite_name,
                        std::optional<std::vector<std::string>> names, std::string called, std::vector<Tensor> out) {
  const NonFinite nonfinite = parse_nonfinite(nonfinite_name);
  const Inputs inputs(base, experts, weights.size());
  const Importance given(importance, experts, weights.size());
  check_apart(out, {&importance});
  Outputs outputs(out, base, experts, weights.size());
  const auto run = [&](auto key) {
    merge<decltype(key)>(inputs, given, weights, floor, nonfinite, names.value_or(std::vector<std::string>()), called,
                         outputs);
  };
  inputs.wide ? run(int64_t()) : run(int32_t());
  outputs.deliver();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("weighted_merge_out", TORCH_BOX(&weighted_merge_out)); }

}  // namespace sk
