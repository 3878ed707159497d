#include <cmath>
#include <cstring>

#include "../ties_options.h"
#include "inputs.h"
#include "ops.h"
#include "ties_merge.h"

namespace sk {
namespace cuda {
namespace {

MergeOptions merge_options(const Inputs& inputs, const TiesOptions& options, bool split) {
  const ScopeBuilder& tensors = inputs.tensors();
  const double lam = tensors.is_wide() ? options.lam : double(float(options.lam));
  require(std::isfinite(lam), "lam must be finite in the compute type, got ", options.lam);
  require(options.semantics != Semantics::exact,
          "semantics must be 'paper', 'mergekit' or 'peft' in the CUDA kernels, got 'exact'");
  MergeOptions merge{};
  merge.rule = options.rule;
  merge.elect_count = options.elect_count;
  merge.divide = options.divide;
  merge.rescale = options.rescale;
  merge.error = options.nonfinite == NonFinite::error;
  merge.drop = options.nonfinite == NonFinite::drop;
  merge.split = split;
  merge.lam = lam;
  merge.trim.all_ties = options.semantics == Semantics::paper;
  merge.trim.drop = merge.drop;
  for (const double density : options.density)
    merge.trim.keep.push_back(keep_count(density, tensors.numel(), options.semantics));
  const auto add = [&](auto compute, Dtype dtype) {
    using C = decltype(compute);
    for (const C weight : weights_of<C>(options, dtype)) merge.weights.push_back(weight);
    if (options.rule == Rule::mergekit_all) merge.divisors.push_back(divisor_of<C>(options, dtype));
  };
  for (const Part& part : tensors.parts()) tensors.is_wide() ? add(double(), part.dtype) : add(float(), part.dtype);
  return merge;
}

template <class T>
std::vector<double> values_of(const Device& device, const Tensor& t) {
  const T* const data = static_cast<const T*>(t.data_ptr());
  const std::vector<T> values = t.is_cpu() ? std::vector<T>(data, data + t.numel()) : device.fetch(data, t.numel());
  return std::vector<double>(values.begin(), values.end());
}

template <class Key>
const Limit<Key>* given_limits(const Inputs& inputs, const TiesOptions& options) {
  using C = ComputeOf<Key>;
  const Device& device = inputs.device();
  const Tensor given = torch::stable::contiguous(*options.thresholds);
  require(given.numel() == inputs.scope().num_tasks, "thresholds must be one value per expert, got ", given.numel());
  require(given.is_cpu() || !device.is_capturing(),
          "thresholds must be on the CPU while a CUDA graph is captured, got a CUDA tensor");
  const Dtype dtype = dtype_of(given, "thresholds");
  require(dtype == Dtype::f32 || dtype == Dtype::f64, "thresholds must be float32 or float64, got another dtype");
  const auto values = dtype == Dtype::f32 ? values_of<float>(device, given) : values_of<double>(device, given);
  std::vector<Limit<Key>> limits;
  for (size_t t = 0; t < values.size(); ++t) {
    const C threshold = C(values[t]);
    const bool ranked_nan = options.cuts && std::isnan(threshold);  // where NaN propagates
    require(threshold >= 0 || ranked_nan, "thresholds must be 0 or greater, got ", threshold);
    Limit<Key> limit{0, options.cuts ? (*options.cuts)[t] : inputs.tensors().numel()};
    memcpy(&limit.threshold, &threshold, sizeof threshold);
    limit.threshold &= kMaxKey<Key>;  // -0 has the sign bit
    limits.push_back(limit);
  }
  return device.upload(limits);
}

void merge_tensors(const std::vector<Tensor>& base, const std::vector<Tensor>& experts, const TiesOptions& options,
                   const std::vector<Tensor>& out, bool split, const std::optional<Tensor>& found) {
  Inputs inputs(base, experts, options.density.size(), out, /*stacked=*/split);
  if (options.nonfinite == NonFinite::error) inputs.check_may_raise();
  const MergeOptions merge = merge_options(inputs, options, split);
  const auto run = [&](auto key) {
    using Key = decltype(key);
    const Limit<Key>* limits = options.thresholds ? given_limits<Key>(inputs, options) : nullptr;
    return ties_merge<Key>(inputs.device(), inputs.tensors(), inputs.scope(), merge, limits);
  };
  const int* const nonfinite = inputs.tensors().is_wide() ? run(int64_t()) : run(int32_t());
  inputs.check_finite(nonfinite, options.names, found);
  inputs.deliver();
}

}  // namespace

Tensor ties_merge(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density, double lam,
                  std::optional<std::vector<double>> weights, std::string semantics, std::string elect,
                  std::string reduce, bool normalize, bool rescale, std::string nonfinite,
                  std::optional<Tensor> thresholds, std::optional<Tensor> found) {
  check_one_tensor(experts, density);
  const Tensor out = torch::stable::new_empty(experts[0], experts[0].sizes());
  merge_tensors(
      as_list(base), experts,
      parse_ties_options(density, lam, weights, semantics, elect, reduce, normalize, rescale, nonfinite, thresholds),
      {out}, /*split=*/false, found);
  return out;
}

void ties_merge_out(std::vector<Tensor> base, std::vector<Tensor> experts, std::vector<double> density, double lam,
                    std::optional<std::vector<double>> weights, std::string semantics, std::string elect,
                    std::string reduce, bool normalize, bool rescale, std::string nonfinite,
                    std::optional<Tensor> thresholds, std::optional<std::vector<int64_t>> cuts,
                    std::optional<std::vector<std::string>> names, std::vector<Tensor> out,
                    std::optional<Tensor> found) {
  merge_tensors(base, experts,
                parse_ties_options(density, lam, weights, semantics, elect, reduce, normalize, rescale, nonfinite,
                                   thresholds, cuts, names),
                out, /*split=*/false, found);
}

Tensor ties_split(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density,
                  std::optional<std::vector<double>> weights, std::string semantics, std::string elect, bool rescale,
                  std::string nonfinite, std::optional<Tensor> thresholds, std::optional<Tensor> found) {
  check_one_tensor(experts, density);
  const Tensor out = new_stack(experts);
  merge_tensors(
      as_list(base), experts,
      parse_ties_options(density, 1.0, weights, semantics, elect, "sum", true, rescale, nonfinite, thresholds), {out},
      /*split=*/true, found);
  return out;
}

}  // namespace cuda
}  // namespace sk
