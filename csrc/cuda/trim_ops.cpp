#include "../trim_options.h"
#include "inputs.h"
#include "ops.h"
#include "trim.h"

namespace sk {
namespace cuda {

std::tuple<Tensor, Tensor> trim_limits(std::vector<Tensor> base, std::vector<Tensor> experts,
                                       std::vector<double> density, std::string semantics_name,
                                       std::string nonfinite_name, std::optional<std::vector<std::string>> names,
                                       std::optional<Tensor> found) {
  const Semantics semantics = parse_semantics(semantics_name);
  const NonFinite nonfinite = parse_nonfinite(nonfinite_name);
  const Inputs inputs(base, experts, density.size(), {});
  const bool error = nonfinite == NonFinite::error, wide = inputs.tensors().is_wide();
  if (error) inputs.check_may_raise();
  TrimOptions options{{}, semantics == Semantics::paper, nonfinite == NonFinite::drop};
  for (const double d : density) options.keep.push_back(keep_count(d, inputs.tensors().numel(), semantics));

  const std::vector<int64_t> shape{int64_t(density.size())};
  const Tensor thresholds = torch::stable::new_empty(experts[0], shape, wide ? ScalarType::Double : ScalarType::Float);
  const Tensor cuts = torch::stable::new_empty(experts[0], shape, ScalarType::Long);
  int* const nonfinite_values = error ? inputs.device().zeros<int>(1) : nullptr;
  const auto fill = [&](auto key) {
    using Key = decltype(key);
    const Limit<Key>* limits = trim<Key>(inputs.device(), inputs.tensors(), inputs.scope(), options, nonfinite_values);
    take_apart(inputs.device(), limits, int(density.size()), static_cast<Key*>(thresholds.data_ptr()),
               static_cast<int64_t*>(cuts.data_ptr()));
  };
  wide ? fill(int64_t()) : fill(int32_t());
  inputs.check_finite(nonfinite_values, names.value_or(std::vector<std::string>()), found);
  return {thresholds, cuts};
}

Tensor trim_thresholds(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density,
                       std::string semantics, std::string nonfinite, std::optional<Tensor> found) {
  check_one_tensor(experts, density);
  return std::get<0>(trim_limits(as_list(base), experts, density, semantics, nonfinite, std::nullopt, found));
}

}  // namespace cuda
}  // namespace sk
