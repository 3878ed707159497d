#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../check.h"
#include "adapter_rows.h"
#include "buffer.h"
#include "inputs.h"
#include "surgery_adapter_kernel.h"

namespace sk {
namespace {

// Kernels read and write rows by vectors.
bool has_contiguous_rows(const Tensor& t) { return t.size(t.dim() - 1) < 2 || t.stride(t.dim() - 1) == 1; }

// In the layout of features, unless their rows overlap: then torch may put another dimension last.
Tensor empty_like_rows(const Tensor& features) {
  Tensor t = torch::stable::empty_like(features);
  if (!has_contiguous_rows(t)) t = torch::stable::new_empty(features, features.sizes());
  ask_for_huge_pages(t);
  return t;
}

// The checked operands of both directions.
struct Operands {
  Tensor features, down, up;
  std::optional<Tensor> task_index, bias;
  bool relu;
  FeaturesShape shape;
  Dtype dtype;
  ScalarType compute;
  int64_t num_tasks, rank, dim;

  Operands(const Tensor& features_, const Tensor& down_, const Tensor& up_, const std::optional<Tensor>& task_index_,
           const std::optional<Tensor>& bias_, const std::string& activation)
      : features(features_),
        down(torch::stable::contiguous(down_)),
        up(torch::stable::contiguous(up_)),
        relu(one_of("activation", activation, {"relu", "none"}) == 0),
        shape(features, task_index_.has_value()),
        dtype(dtype_of(features, "features")),
        compute(dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float),
        dim(shape.dim) {
    require(features.is_cpu() && down.is_cpu() && up.is_cpu(),
            "features, down and up must be on the CPU, got another device");
    require(has_contiguous_rows(features), "features must be contiguous in the last dimension, got stride ",
            features.stride(features.dim() - 1));
    require(down.scalar_type() == compute && up.scalar_type() == compute,
            "down and up must be float32, or float64 for float64 features, got another dtype");
    require(down.dim() == 3, "down must be [num_tasks, rank, dim], got ", down.dim(), " dimensions");
    num_tasks = down.size(0), rank = down.size(1);
    require(down.size(2) == dim, "down must have the dim of features, ", dim, ", got ", down.size(2));
    require(has_shape(up, {num_tasks, dim, rank}), "up must have shape (", num_tasks, ", ", dim, ", ", rank,
            "), got another");
    if (bias_) {
      require(bias_->is_cpu() && bias_->scalar_type() == compute && has_shape(*bias_, {num_tasks, dim}),
              "bias must be (", num_tasks, ", ", dim, ") on the CPU in the dtype of down, got another tensor");
      bias = torch::stable::contiguous(*bias_);
    }
    if (task_index_) {
      require(task_index_->is_cpu() && task_index_->scalar_type() == ScalarType::Long &&
                  has_shape(*task_index_, {shape.samples}),
              "task_index must be int64 [", shape.samples, "] on the CPU, got another tensor");
      task_index = torch::stable::contiguous(*task_index_);
    } else {
      require(shape.groups == num_tasks, "features must have the num_tasks of down, ", num_tasks, ", got ",
              shape.groups);
    }
  }
  Plan plan() const { return Plan(shape, num_tasks, rank, task_index); }
  Tensor empty(const std::vector<int64_t>& sizes) const { return torch::stable::new_empty(features, sizes, compute); }
  template <class C>
  const C* bias_of(int64_t task) const {
    return bias ? static_cast<const C*>(bias->data_ptr()) + task * dim : nullptr;
  }
  Rows rows(const std::optional<Tensor>& t) const { return t ? Rows(*t, shape) : Rows(); }

  // The shape of a row for every sample.
  std::vector<int64_t> means_sizes() const {
    return shape.indexed ? std::vector<int64_t>{shape.samples, dim}
                         : std::vector<int64_t>{num_tasks, shape.samples, dim};
  }
};

// Every task's adapter, packed for one direction.
template <class Key>
class Adapters {
 public:
  using C = ComputeOf<Key>;

  Adapters(const Operands& operands, AdapterPackKernel<Key> pack)
      : rank_(operands.rank),
        dim_(operands.dim),
        memory_(operands.num_tasks * PackedAdapter<C>::size(operands.dim, operands.rank)) {
    const C* const down = static_cast<const C*>(operands.down.data_ptr());
    const C* const up = static_cast<const C*>(operands.up.data_ptr());
    const int64_t size = rank_ * dim_, grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(size, 1));
    torch::stable::parallel_for(0, operands.num_tasks, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) pack(down + t * size, up + t * size, of(t));
    });
  }
  PackedAdapter<C> of(int64_t task) const {
    C* const at = memory_.get() + task * PackedAdapter<C>::size(dim_, rank_);
    return {dim_, rank_, at, at + dim_ * padded(rank_)};
  }

 private:
  int64_t rank_, dim_;
  Buffer<C> memory_;
};

// means and hidden are optional.
struct Results {
  Tensor corrected;
  std::optional<Tensor> means, hidden;
};

template <class Key>
void run_forward(const Operands& operands, const Results& results) {
  using C = ComputeOf<Key>;
  const AdapterKernels& kernels = SK_KERNELS(adapter_kernels);
  const auto kernel = kernels.forward.get<Key>(operands.dtype);
  const Adapters<Key> adapters(operands, kernels.pack_forward.get<Key>(operands.dtype));
  const Plan plan = operands.plan();
  const Rows from = operands.rows(operands.features), to = operands.rows(results.corrected),
             means = operands.rows(results.means);
  C* const hidden = results.hidden ? static_cast<C*>(results.hidden->data_ptr()) : nullptr;
  plan.parallel<C>(block_scratch(operands.dim, operands.rank), [&](int64_t u, C* scratch) {
    const Plan::Unit& unit = plan.units[u];
    const auto each_mean = [&](const auto& change) {
      for (int64_t i = unit.first; means && i < unit.last; ++i) {
        C* const mean = static_cast<C*>(means.of(plan.order[i], 0));
        for (int64_t d = 0; d < operands.dim; ++d) change(mean[d]);
      }
    };
    each_mean([](C& mean) { mean = 0; });
    plan.each_block(unit, [&](const RowBlock& block) {
      Rows::Pointers sources, targets, sums;
      kernel({adapters.of(block.task), operands.template bias_of<C>(block.task), operands.relu, block.count,
              from.of(block, sources), to.of(block, targets), means.of(block, sums),
              hidden ? hidden + block.row * operands.rank : nullptr, scratch});
    });
    each_mean([&](C& mean) { mean /= C(operands.shape.tokens); });
  });
}

std::tuple<Tensor, Tensor, Tensor> surgery_adapter(Tensor features, Tensor down, Tensor up,
                                                   std::optional<Tensor> task_index, bool token_mean, bool keep_hidden,
                                                   std::optional<Tensor> bias, std::string activation) {
  const Operands operands(features, down, up, task_index, bias, activation);
  Results results = {empty_like_rows(features), std::nullopt, std::nullopt};
  if (token_mean) results.means = operands.empty(operands.means_sizes());
  if (keep_hidden) results.hidden = operands.empty({operands.shape.rows(), operands.rank});
  (operands.dtype == Dtype::f64 ? run_forward<int64_t> : run_forward<int32_t>)(operands, results);
  const auto or_empty = [&](const std::optional<Tensor>& t) { return t ? *t : operands.empty({0}); };
  return {results.corrected, or_empty(results.means), or_empty(results.hidden)};
}

// The incoming gradients, what forward kept, and the wanted ones: all optional but hidden.
struct Gradients {
  std::optional<Tensor> grad, grad_means;
  Tensor hidden;
  std::optional<Tensor> features, down, up, bias;  // down and up: both or none
};

// The sums over each unit: the gradients of down, and of up as the kernel leaves it, both [rank, padded(dim)], and
// that of minus the bias [padded(dim)].
template <class Key>
class UnitSums {
 public:
  using C = ComputeOf<Key>;

  UnitSums(const Plan& plan, const Operands& operands)
      : plan_(plan), rank_(operands.rank), dim_(operands.dim), memory_(int64_t(plan.units.size()) * size()) {}

  int64_t size() const { return (2 * rank_ + 1) * padded(dim_); }
  C* down(int64_t unit) const { return memory_.get() + unit * size(); }
  C* minus_up_t(int64_t unit) const { return down(unit) + rank_ * padded(dim_); }
  C* minus_bias(int64_t unit) const { return minus_up_t(unit) + rank_ * padded(dim_); }

  // The units of each task in their order: d_down [num_tasks, rank, dim], d_up [num_tasks, dim, rank], or none of the
  // two, and d_bias [num_tasks, dim], or not.
  void deliver(int64_t num_tasks, const Gradients& wanted) const {
    const auto at = [](const std::optional<Tensor>& t, int64_t place) {
      return t ? static_cast<C*>(t->data_ptr()) + place : nullptr;
    };
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(size(), 1));
    torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        deliver(t, at(wanted.down, t * rank_ * dim_), at(wanted.up, t * rank_ * dim_), at(wanted.bias, t * dim_));
    });
  }

 private:
  const Plan& plan_;
  int64_t rank_, dim_;
  Buffer<C> memory_;

  void deliver(int64_t task, C* d_down, C* d_up, C* d_bias) const {
    const auto [first, last] = plan_.units_of(task);
    if (first == last) {  // no sample asked for this task
      if (d_down) std::fill_n(d_down, rank_ * dim_, C(0));
      if (d_up) std::fill_n(d_up, rank_ * dim_, C(0));
      if (d_bias) std::fill_n(d_bias, dim_, C(0));
      return;
    }
    C* const sum = down(first);
    for (int64_t u = first + 1; u < last; ++u)
      for (int64_t i = 0; i < size(); ++i) sum[i] += down(u)[i];
    const int64_t width = padded(dim_);
    for (int64_t d = 0; d_bias && d < dim_; ++d) d_bias[d] = -minus_bias(first)[d];
    if (!d_down) return;
    for (int64_t r = 0; r < rank_; ++r) std::copy_n(sum + r * width, dim_, d_down + r * dim_);
    // By strips, so that the lines written to stay in the first-level cache until they are full.
    const C* const of_up = minus_up_t(first);
    for (int64_t strip = 0; strip < dim_; strip += kPadding)
      for (int64_t r = 0; r < rank_; ++r)
        for (int64_t d = strip; d < std::min(strip + kPadding, dim_); ++d) d_up[d * rank_ + r] = -of_up[r * width + d];
  }
};

template <class Key>
void run_backward(const Operands& operands, const Gradients& gradients) {
  using C = ComputeOf<Key>;
  const AdapterKernels& kernels = SK_KERNELS(adapter_kernels);
  const auto kernel = kernels.backward.get<Key>(operands.dtype);
  const Adapters<Key> adapters(operands, kernels.pack_backward.get<Key>(operands.dtype));
  const Plan plan = operands.plan();
  const bool need_adapter = gradients.down.has_value(), need_bias = gradients.bias.has_value();
  const Rows grad = operands.rows(gradients.grad), grad_means = operands.rows(gradients.grad_means),
             features = need_adapter ? operands.rows(operands.features) : Rows(),
             d_features = operands.rows(gradients.features);
  const C* const hidden = static_cast<const C*>(gradients.hidden.data_ptr());
  std::optional<UnitSums<Key>> sums;
  if (need_adapter || need_bias) sums.emplace(plan, operands);
  plan.parallel<C>(block_scratch(operands.dim, operands.rank), [&](int64_t u, C* scratch) {
    if (sums) std::fill_n(sums->down(u), sums->size(), C(0));
    plan.each_block(plan.units[u], [&](const RowBlock& block) {
      Rows::Pointers grads, grads_of_means, sources, targets;
      kernel({adapters.of(block.task), operands.relu, block.count, grad.of(block, grads),
              grad_means.of(block, grads_of_means), C(operands.shape.tokens), features.of(block, sources),
              hidden + block.row * operands.rank, d_features.of(block, targets), need_adapter ? sums->down(u) : nullptr,
              need_adapter ? sums->minus_up_t(u) : nullptr, need_bias ? sums->minus_bias(u) : nullptr, scratch});
    });
  });
  if (sums) sums->deliver(operands.num_tasks, gradients);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> surgery_adapter_backward(std::optional<Tensor> grad,
                                                                    std::optional<Tensor> grad_means, Tensor features,
                                                                    Tensor down, Tensor up,
                                                                    std::optional<Tensor> task_index, Tensor hidden,
                                                                    bool need_features, bool need_adapter,
                                                                    bool need_bias, std::string activation) {
  const Operands operands(features, down, up, task_index, std::nullopt, activation);
  const auto check = [&](const Tensor& t, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes) {
    require(t.is_cpu() && t.scalar_type() == dtype && has_shape(t, sizes), name,
            " must be what surgery_adapter's results imply on the CPU, got another device, dtype or shape");
    return has_contiguous_rows(t) ? t : torch::stable::contiguous(t);
  };
  const auto sizes = features.sizes();
  if (grad) grad = check(*grad, "grad", features.scalar_type(), {sizes.begin(), sizes.end()});
  if (grad_means) grad_means = check(*grad_means, "grad_means", operands.compute, operands.means_sizes());
  hidden = torch::stable::contiguous(check(hidden, "hidden", operands.compute, {operands.shape.rows(), operands.rank}));

  Gradients gradients = {grad, grad_means, hidden, std::nullopt, std::nullopt, std::nullopt, std::nullopt};
  if (need_features) gradients.features = empty_like_rows(features);
  if (need_adapter) {
    gradients.down = torch::stable::empty_like(operands.down);
    gradients.up = torch::stable::empty_like(operands.up);
  }
  if (need_bias) gradients.bias = operands.empty({operands.num_tasks, operands.dim});
  (operands.dtype == Dtype::f64 ? run_backward<int64_t> : run_backward<int32_t>)(operands, gradients);
  const auto or_empty = [](const std::optional<Tensor>& t, const Tensor& like) {
    return t ? *t : torch::stable::new_empty(like, std::vector<int64_t>{0});
  };
  return {or_empty(gradients.features, features), or_empty(gradients.down, down), or_empty(gradients.up, up),
          or_empty(gradients.bias, down)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("surgery_adapter", TORCH_BOX(&surgery_adapter));
  m.impl("surgery_adapter_backward", TORCH_BOX(&surgery_adapter_backward));
}

}  // namespace sk
