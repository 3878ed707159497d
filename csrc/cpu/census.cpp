#include <torch/csrc/stable/library.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <tuple>

#include "buffer.h"
#include "census_kernel.h"
#include "inputs.h"

namespace sk {
namespace {

template <class Key>
class Census {
 public:
  Census(const Scope& scope, const double* thresholds) : scope_(scope), thresholds_(thresholds) {}

  // counts: [CensusCounts::size], zero; sums: [CensusSums::size]
  void run(size_t p, int64_t* counts, double* sums) const {
    const Part& part = scope_.parts[p];
    const int64_t n = scope_.num_tasks, num_counts = CensusCounts{n}.size(), num_sums = CensusSums{n}.size();
    const int64_t pieces = (part.numel + kSumBlock - 1) / kSumBlock;
    std::vector<Key> limits;
    for (int64_t t = 0; thresholds_ && t < n; ++t) limits.push_back(key_of(thresholds_[int64_t(p) * n + t]));
    const Buffer<double> held(num_sums * std::max<int64_t>(1, pieces));  // [num_sums, pieces]
    std::mutex adding;
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
      std::vector<int64_t> found(size_t(num_counts), 0);
      std::vector<uint64_t> words(size_t(2 * n));
      const Buffer<double> lanes(num_sums * kSumLanes);
      std::vector<const void*> experts(static_cast<size_t>(n));
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t begin = piece * kSumBlock;
        CensusArgs<Key> args{};
        for (int64_t t = 0; t < n; ++t) experts[size_t(t)] = part.expert_at(t, begin);
        args.base = part.base_at(begin);
        args.experts = experts.data();
        args.num_tasks = int(n);
        args.count = std::min(kSumBlock, part.numel - begin);
        args.thresholds = limits.empty() ? nullptr : limits.data();
        std::fill_n(lanes.get(), num_sums * kSumLanes, 0.0);
        SK_KERNELS(census_kernels).add.template get<Key>(part.dtype)(args, words.data(), found.data(), lanes.get());
        for (int64_t s = 0; s < num_sums; ++s)
          held.get()[s * pieces + piece] = fold_halves(lanes.get() + s * kSumLanes, kSumLanes);
        scope_.report({part, p, 0, begin, args.count});
      }
      const std::lock_guard<std::mutex> lock(adding);
      for (int64_t c = 0; c < num_counts; ++c) counts[c] += found[size_t(c)];
    });
    for (int64_t s = 0; s < num_sums; ++s) sums[s] = fold_halves(held.get() + s * pieces, pieces);
  }

 private:
  // Magnitudes order like their bits.
  static Key key_of(double threshold) {
    const auto magnitude = ComputeOf<Key>(threshold);
    Key key;
    memcpy(&key, &magnitude, sizeof key);
    return key;
  }

  const Scope& scope_;
  const double* thresholds_;
};

std::tuple<Tensor, Tensor> census(std::vector<Tensor> base, std::vector<Tensor> experts, int64_t num_tasks,
                                  std::optional<Tensor> thresholds) {
  require(num_tasks > 0, "num_tasks must be 1 or more, got ", num_tasks);
  require(!base.empty(), "base must be one tensor for every merged tensor, got none");
  const Inputs inputs(base, experts, size_t(num_tasks));
  const int64_t parts = int64_t(base.size()), n = num_tasks;
  const double* limits = nullptr;
  if (thresholds) {
    require(thresholds->scalar_type() == ScalarType::Double && thresholds->is_contiguous() &&
                thresholds->numel() == parts * n,
            "thresholds must be contiguous float64 [tensors, num_tasks]");
    limits = static_cast<const double*>(thresholds->data_ptr());
    for (int64_t i = 0; i < parts * n; ++i) require(limits[i] >= 0, "thresholds must be 0 or greater, got ", limits[i]);
  }
  const int64_t num_counts = CensusCounts{n}.size(), num_sums = CensusSums{n}.size();
  const Tensor counts = torch::stable::new_zeros(experts[0], {parts, num_counts}, ScalarType::Long);
  const Tensor sums = torch::stable::new_empty(experts[0], {parts, num_sums}, ScalarType::Double);
  const auto fill = [&](auto key) {
    const Census<decltype(key)> census(inputs.scope, limits);
    for (int64_t p = 0; p < parts; ++p)
      census.run(size_t(p), static_cast<int64_t*>(counts.data_ptr()) + p * num_counts,
                 static_cast<double*>(sums.data_ptr()) + p * num_sums);
  };
  inputs.wide ? fill(int64_t()) : fill(int32_t());
  return {counts, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("census", TORCH_BOX(&census)); }

}  // namespace sk
