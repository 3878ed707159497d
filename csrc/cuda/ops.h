// The ops of this folder, as csrc/ops.cpp describes them; register.h makes them known to torch.
#pragma once
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"

namespace sk {
namespace cuda {

Tensor trim_thresholds(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density,
                       std::string semantics, std::string nonfinite, std::optional<Tensor> found);

std::tuple<Tensor, Tensor> trim_limits(std::vector<Tensor> base, std::vector<Tensor> experts,
                                       std::vector<double> density, std::string semantics, std::string nonfinite,
                                       std::optional<std::vector<std::string>> names, std::optional<Tensor> found);

Tensor ties_merge(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density, double lam,
                  std::optional<std::vector<double>> weights, std::string semantics, std::string elect,
                  std::string reduce, bool normalize, bool rescale, std::string nonfinite,
                  std::optional<Tensor> thresholds, std::optional<Tensor> found);

void ties_merge_out(std::vector<Tensor> base, std::vector<Tensor> experts, std::vector<double> density, double lam,
                    std::optional<std::vector<double>> weights, std::string semantics, std::string elect,
                    std::string reduce, bool normalize, bool rescale, std::string nonfinite,
                    std::optional<Tensor> thresholds, std::optional<std::vector<int64_t>> cuts,
                    std::optional<std::vector<std::string>> names, std::vector<Tensor> out,
                    std::optional<Tensor> found);

Tensor ties_split(std::optional<Tensor> base, std::vector<Tensor> experts, std::vector<double> density,
                  std::optional<std::vector<double>> weights, std::string semantics, std::string elect, bool rescale,
                  std::string nonfinite, std::optional<Tensor> thresholds, std::optional<Tensor> found);

}  // namespace cuda
}  // namespace sk
