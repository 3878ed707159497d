// The options of the TIES ops, parsed and checked, for every backend in C++.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/rounding.h"
#include "ties_rule.h"
#include "trim_options.h"

namespace sk {

struct TiesOptions {
  std::vector<double> density;
  double lam;
  std::optional<std::vector<double>> weights;
  Semantics semantics;
  Rule rule;
  bool elect_count, divide, rescale;
  NonFinite nonfinite;
  std::optional<Tensor> thresholds;
  std::optional<std::vector<int64_t>> cuts;  // beside thresholds: where its ties end; none: all of them are kept
  std::vector<std::string> names;
  std::optional<Tensor> scales, unique_scales;  // [num_tensors, num_tasks]
  int64_t min_count = 0;
};

inline TiesOptions parse_ties_options(std::vector<double> density, double lam,
                                      std::optional<std::vector<double>> weights, const std::string& semantics_name,
                                      const std::string& elect_name, const std::string& reduce_name, bool normalize,
                                      bool rescale, const std::string& nonfinite, std::optional<Tensor> thresholds,
                                      std::optional<std::vector<int64_t>> cuts = std::nullopt,
                                      std::optional<std::vector<std::string>> names = std::nullopt) {
  require(!cuts || thresholds, "thresholds must be given where cuts are, got none");
  require(!cuts || cuts->size() == density.size(), "cuts must be one per expert, got ", cuts ? cuts->size() : 0);
  const Semantics semantics = parse_semantics(semantics_name);
  const int reduce = one_of("reduce", reduce_name, {"mean", "sum", "max", "magmax", "unique"});
  const int elect = one_of("elect", elect_name, {"sum", "count", "none"});
  const bool max = reduce == 2, magmax = reduce == 3, unique = reduce == 4, all = elect == 2,
             paper = semantics == Semantics::paper, exact = semantics == Semantics::exact,
             mergekit = semantics == Semantics::mergekit || exact;
  require(!max || paper, "reduce must be 'mean' or 'sum' with semantics='", semantics_name, "', got 'max'");
  require(!(magmax || unique) || (exact && all), "semantics and elect must be 'exact' and 'none' with reduce='",
          reduce_name, "', got '", semantics_name, "' and '", elect_name, "'");
  require(!all || mergekit, "elect must be 'sum' or 'count' with semantics='", semantics_name, "', got 'none'");
  require(mergekit || (normalize && !rescale), "normalize and rescale must keep their defaults with semantics='",
          semantics_name, "', got others");
  require(normalize || !unique, "normalize must be True with reduce='unique', got False");
  require(!weights || weights->size() == density.size(), "weights must be one per expert, got ",
          weights ? weights->size() : 0);
  require(!paper || !weights, "weights must be None with semantics='paper', got weights");
  require(!(magmax || unique) || !weights, "weights must be None with reduce='", reduce_name, "', got weights");
  const Rule rule = magmax         ? Rule::magmax
                    : exact && all ? Rule::exact_all
                    : exact        ? Rule::exact
                    : all          ? Rule::mergekit_all
                    : mergekit     ? Rule::mergekit
                    : !paper       ? Rule::peft
                    : max          ? Rule::paper_max
                                   : Rule::paper;
  return {std::move(density),
          lam,
          std::move(weights),
          semantics,
          rule,
          elect == 1,
          (reduce == 0 || unique) && normalize,
          rescale,
          parse_nonfinite(nonfinite),
          std::move(thresholds),
          std::move(cuts),
          std::move(names).value_or(std::vector<std::string>()),
          std::nullopt,
          std::nullopt};
}

// What scales entries before they are summed, and how many an element needs.
inline void set_factors(TiesOptions& options, std::optional<Tensor> scales, std::optional<Tensor> unique_scales,
                        int64_t min_count, const std::string& reduce) {
  require(!scales || options.semantics == Semantics::mergekit || options.semantics == Semantics::exact,
          "semantics must be 'mergekit' or 'exact' where scales are given, got another");
  require(!scales || !options.rescale, "rescale must be False where scales are given, got True");
  require(!unique_scales || reduce == "unique", "reduce must be 'unique' where unique_scales are given, got '", reduce,
          "'");
  require(min_count >= 0 && min_count <= int64_t(options.density.size()),
          "min_count must be between 0 and the number of experts, got ", min_count);
  options.scales = std::move(scales);
  options.unique_scales = std::move(unique_scales);
  options.min_count = min_count;
}

// Room for what every expert gets of its own: [num_tasks, *shape].
inline Tensor new_stack(const std::vector<Tensor>& experts) {
  std::vector<int64_t> shape{int64_t(experts.size())};
  for (int64_t d = 0; d < experts[0].dim(); ++d) shape.push_back(experts[0].size(d));
  return torch::stable::new_empty(experts[0], shape);
}

template <class C>
C stored(double x, Dtype dtype) {
  return dtype == Dtype::f64 ? C(x) : C(round_to(float(x), dtype));
}

// The weights as they enter the sums of a tensor; empty: all one.
template <class C>
std::vector<C> weights_of(const TiesOptions& options, Dtype dtype) {
  std::vector<C> weights;
  for (const double w : options.weights.value_or(std::vector<double>()))
    weights.push_back(options.semantics == Semantics::mergekit ? stored<C>(w, dtype)
                      : options.semantics == Semantics::exact  ? C(w)
                                                               : C(float(w)));
  return weights;
}

// What mergekit divides the sum by without an election. Weights that cancel divide nothing.
template <class C>
C divisor_of(const TiesOptions& options, Dtype dtype) {
  C sum = 0;
  for (const C w : weights_of<C>(options, dtype)) sum += w;
  sum = stored<C>(options.weights ? double(sum) : double(options.density.size()), dtype);
  return std::abs(sum) < C(1e-8) ? C(1) : sum;
}

}  // namespace sk
