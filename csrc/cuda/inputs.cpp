#include "inputs.h"

#include <algorithm>

namespace sk {
namespace cuda {
namespace {

const Tensor& first_of(const std::vector<Tensor>& experts, size_t num_tasks) {
  require(num_tasks > 0 && experts.size() % num_tasks == 0,
          "experts must be one tensor for every expert and merged tensor, got ", experts.size(), " for ", num_tasks,
          " experts");
  require(!experts.empty(), "experts must be at least one tensor, got none");
  return experts[0];
}

}  // namespace

Inputs::Inputs(const std::vector<Tensor>& base, const std::vector<Tensor>& experts, size_t num_tasks,
               const std::vector<Tensor>& out, bool stacked)
    : current_(first_of(experts, num_tasks)), tensors_(int(num_tasks)), wanted_(out) {
  const size_t parts = experts.size() / num_tasks;
  require(base.empty() || base.size() == parts, "base must be one tensor for every merged tensor, got ", base.size(),
          " for ", parts);
  require(out.empty() || out.size() == parts, "out must be one tensor for every merged tensor, got ", out.size());
  check_apart(out, {&base, &experts});
  const bool wide = dtype_of(experts[0], "experts") == Dtype::f64;
  for (size_t p = 0; p < parts; ++p) {
    const Tensor& first = experts[p * num_tasks];
    const Dtype dtype = dtype_of(first, "experts");
    require(wide == (dtype == Dtype::f64), "experts must be all float64 or none within one scope, got both");
    std::vector<const void*> pointers;
    for (size_t t = 0; t < num_tasks; ++t) {
      const Tensor& expert = experts[p * num_tasks + t];
      check_alike(expert, first, experts[0], "experts[" + std::to_string(t) + "]");
      pointers.push_back(pointer(expert));
    }
    if (!base.empty()) check_alike(base[p], first, experts[0], "base");
    if (!out.empty()) {
      if (!stacked) check_alike(out[p], first, experts[0], "out");
      filled_.push_back(out[p].is_contiguous() ? out[p] : torch::stable::new_empty(out[p], out[p].sizes()));
    }
    tensors_.add(dtype, first.numel(), base.empty() ? nullptr : pointer(base[p]), pointers,
                 out.empty() ? nullptr : filled_[p].data_ptr());
  }
  scope_ = tensors_.upload(device());
}

const void* Inputs::pointer(const Tensor& t) {
  alive_.push_back(torch::stable::contiguous(t));
  return alive_.back().data_ptr();
}

void Inputs::deliver() {
  for (size_t p = 0; p < wanted_.size(); ++p)
    if (!wanted_[p].is_contiguous()) torch::stable::copy_(wanted_[p], filled_[p]);
}

void Inputs::check_finite(const int* nonfinite, const std::vector<std::string>& names,
                          const std::optional<Tensor>& found) const {
  const bool delivers =
      std::any_of(wanted_.begin(), wanted_.end(), [](const Tensor& out) { return !out.is_contiguous(); });
  if (nonfinite && found && !delivers) {
    require(found->numel() == 1 && found->scalar_type() == ScalarType::Long, "found must be int64 [1], got another");
    device().add(nonfinite, static_cast<int64_t*>(found->data_ptr()));
    return;
  }
  if (!nonfinite || device().fetch(nonfinite, 1)[0] == 0) return;
  const int64_t num_tasks = scope_.num_tasks, columns = 1 + 2 * num_tasks;
  const auto counts = device().fetch(count_nonfinite(device(), scope_), scope_.num_parts * columns);
  for (int64_t p = 0; p < scope_.num_parts; ++p) {
    const std::string where = size_t(p) < names.size() ? " in tensor '" + names[size_t(p)] + "'" : "";
    const auto* of_part = counts.data() + p * columns;
    require(of_part[0] == 0, "base must be finite, got ", of_part[0], " NaN or infinite values", where);
    for (int64_t t = 0; t < num_tasks; ++t) {
      const auto of_expert = of_part[1 + 2 * t], of_task_vector = of_part[2 + 2 * t];
      require(of_expert == 0, "experts[", t, "] must be finite, got ", of_expert, " NaN or infinite values", where);
      require(of_task_vector == 0, "experts[", t, "] - base must be finite, got ", of_task_vector, " overflows", where);
    }
  }
}

void Inputs::check_may_raise() const {
  require(!device().is_capturing(),
          "nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured, got 'error'");
}

}  // namespace cuda
}  // namespace sk
