#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <numeric>
#include <optional>
#include <tuple>

#include "../check.h"
#include "buffer.h"
#include "inputs.h"
#include "surgery_adapter_kernel.h"

namespace sk {
namespace {

// Features [num_tasks, samples, (tokens,) dim], or [samples, (tokens,) dim] where each sample names its task.
struct Shape {
  int64_t groups, samples, tokens, dim;  // groups: num_tasks, or 1

  Shape(const Tensor& t, bool indexed) {
    const int64_t first = indexed ? 0 : 1, last = t.dim() - 1;
    require(t.dim() == first + 2 || t.dim() == first + 3, "features must have ", first + 2, " or ", first + 3,
            " dimensions, got ", t.dim());
    groups = indexed ? 1 : t.size(0);
    samples = t.size(first);
    tokens = last - first == 2 ? t.size(first + 1) : 1;
    dim = t.size(last);
  }
  int64_t all_samples() const { return groups * samples; }
  int64_t rows() const { return all_samples() * tokens; }
};

// Finds a row of such a tensor, whatever its strides.
struct Rows {
  char* at;
  int64_t samples, group, sample, token;  // strides in bytes

  Rows(const Tensor& t, const Shape& shape, bool indexed) : at(static_cast<char*>(t.data_ptr())) {
    const int64_t first = indexed ? 0 : 1, size = int64_t(t.element_size());
    require(shape.dim < 2 || t.stride(t.dim() - 1) == 1, "features must be contiguous in its last dimension");
    samples = shape.samples;
    group = indexed ? 0 : t.stride(0) * size;
    sample = t.stride(first) * size;
    token = t.dim() == first + 3 ? t.stride(first + 1) * size : 0;
  }
  void* row(int64_t i, int64_t s) const { return at + i / samples * group + i % samples * sample + s * token; }
};

// Which samples each task has, and their work in units: ranges of samples of one task, cut by shape alone, so that
// sums over a unit, and then over the units of a task, do not depend on the number of threads.
struct Plan {
  struct Unit {
    int64_t task, first, last;  // order[first, last)
  };
  std::vector<int64_t> order;  // samples, task by task
  std::vector<Unit> units;     // in order of the tasks
  int64_t tokens, grain;

  Plan(const Shape& shape, int64_t num_tasks, int64_t rank, const Tensor* task_index) : order(shape.all_samples()) {
    constexpr int64_t kUnits = 16, kWorkPerThread = 1 << 19;  // multiply-adds
    std::vector<int64_t> ends(num_tasks);
    if (task_index) {
      count(static_cast<const int64_t*>(task_index->data_ptr()), ends);
    } else {
      std::iota(order.begin(), order.end(), 0);
      for (int64_t t = 0; t < num_tasks; ++t) ends[t] = (t + 1) * shape.samples;
    }
    tokens = shape.tokens;
    const int64_t wanted = (kUnits + num_tasks - 1) / std::max<int64_t>(num_tasks, 1);
    for (int64_t t = 0, first = 0; t < num_tasks; first = ends[t++]) {
      const int64_t samples = ends[t] - first;
      const int64_t parts = std::min({wanted, samples, (samples * tokens + kBlockRows - 1) / kBlockRows});
      for (int64_t p = 0; p < parts; ++p)
        units.push_back({t, first + samples * p / parts, first + samples * (p + 1) / parts});
    }
    const int64_t work = shape.rows() * shape.dim * rank / std::max<int64_t>(int64_t(units.size()), 1);
    grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(work, 1));
  }

  // The first unit of a task and the one after its last.
  std::pair<int64_t, int64_t> units_of(int64_t task) const {
    const auto before = [](const Unit& unit, int64_t t) { return unit.task < t; };
    const auto first = std::lower_bound(units.begin(), units.end(), task, before);
    const auto last = std::lower_bound(first, units.end(), task + 1, before);
    return {first - units.begin(), last - units.begin()};
  }

  // body(first unit, last unit)
  template <class Body>
  void parallel(const Body& body) const {
    torch::stable::parallel_for(0, int64_t(units.size()), grain, body);
  }

 private:
  void count(const int64_t* index, std::vector<int64_t>& ends) {
    const int64_t num_tasks = int64_t(ends.size());
    for (size_t i = 0; i < order.size(); ++i) {
      require(0 <= index[i] && index[i] < num_tasks, "task_index must be in [0, ", num_tasks, "), got ", index[i]);
      ++ends[index[i]];
    }
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    std::vector<int64_t> next(ends);
    for (size_t i = order.size(); i-- > 0;) order[--next[index[i]]] = int64_t(i);
  }
};

// The checked operands of both directions.
struct Operands {
  Shape shape;
  Dtype dtype;
  bool indexed;
  Tensor down, up;
  std::optional<Tensor> task_index;
  int64_t num_tasks, rank;

  Operands(const Tensor& features, const Tensor& down_, const Tensor& up_, const std::optional<Tensor>& task_index_)
      : shape(features, task_index_.has_value()),
        dtype(dtype_of(features, "features")),
        indexed(task_index_.has_value()),
        down(torch::stable::contiguous(down_)),
        up(torch::stable::contiguous(up_)) {
    const ScalarType compute = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
    require(features.is_cpu() && down.is_cpu() && up.is_cpu(), "features, down and up must be on the CPU");
    require(down.scalar_type() == compute && up.scalar_type() == compute,
            "down and up must be float32, or float64 for float64 features, got another dtype");
    require(down.dim() == 3 && up.dim() == 3, "down and up must have 3 dimensions");
    num_tasks = down.size(0), rank = down.size(1);
    require(down.size(2) == shape.dim, "down must have shape [num_tasks, rank, ", shape.dim, "], got ", down.size(2));
    require(up.size(0) == num_tasks && up.size(1) == shape.dim && up.size(2) == rank, "up must have shape [", num_tasks,
            ", ", shape.dim, ", ", rank, "]");
    if (indexed) {
      require(task_index_->is_cpu() && task_index_->scalar_type() == ScalarType::Long && task_index_->dim() == 1 &&
                  task_index_->size(0) == shape.samples,
              "task_index must be int64 [", shape.samples, "] on the CPU");
      task_index = torch::stable::contiguous(*task_index_);
    } else {
      require(shape.groups == num_tasks, "features must have ", num_tasks, " tasks, got ", shape.groups);
    }
  }
  Plan plan() const { return Plan(shape, num_tasks, rank, task_index ? &*task_index : nullptr); }
  ScalarType compute() const { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }
};

// Every task's adapter, packed for one direction.
template <class Key>
struct Adapters {
  using C = ComputeOf<Key>;

  int64_t rank, dim;
  Buffer<C> memory;

  Adapters(const Operands& operands, const PerDtype<AdapterPackKernel>& kernels)
      : rank(operands.rank), dim(operands.shape.dim), memory(operands.num_tasks * PackedAdapter<C>::size(dim, rank)) {
    const C* const down = static_cast<const C*>(operands.down.data_ptr());
    const C* const up = static_cast<const C*>(operands.up.data_ptr());
    const int64_t size = rank * dim, grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(size, 1));
    torch::stable::parallel_for(0, operands.num_tasks, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) kernels.get<Key>(operands.dtype)(down + t * size, up + t * size, of(t));
    });
  }
  PackedAdapter<C> of(int64_t task) const {
    C* const at = memory.get() + task * PackedAdapter<C>::size(dim, rank);
    return {dim, rank, at, at + dim * padded(rank)};
  }
};

template <class Key>
void run_forward(const Operands& operands, const Tensor& features, const Tensor& corrected, const Tensor& means,
                 const Tensor& hidden) {
  using C = ComputeOf<Key>;
  const Shape& shape = operands.shape;
  const Adapters<Key> adapters(operands, SK_KERNELS(adapter_kernels).pack_forward);
  const Plan plan = operands.plan();
  const Rows from(features, shape, operands.indexed), to(corrected, shape, operands.indexed);
  C* const sums = means.numel() ? static_cast<C*>(means.data_ptr()) : nullptr;
  C* const kept = hidden.numel() ? static_cast<C*>(hidden.data_ptr()) : nullptr;
  plan.parallel([&](int64_t first_unit, int64_t last_unit) {
    const Buffer<C> scratch(block_scratch(shape.dim, operands.rank));
    std::array<const void*, kBlockRows> rows;
    std::array<void*, kBlockRows> outputs;
    std::array<C*, kBlockRows> sums_of_rows;
    for (int64_t u = first_unit; u < last_unit; ++u) {
      const Plan::Unit unit = plan.units[u];
      if (sums)
        for (int64_t i = unit.first; i < unit.last; ++i) std::fill_n(sums + plan.order[i] * shape.dim, shape.dim, C(0));
      for (int64_t row = unit.first * plan.tokens, end = unit.last * plan.tokens; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t sample = plan.order[(row + i) / plan.tokens], token = (row + i) % plan.tokens;
          rows[i] = from.row(sample, token);
          outputs[i] = to.row(sample, token);
          if (sums) sums_of_rows[i] = sums + sample * shape.dim;
        }
        SK_KERNELS(adapter_kernels)
            .forward.get<Key>(operands.dtype)({adapters.of(unit.task), count, rows.data(), outputs.data(),
                                               sums ? sums_of_rows.data() : nullptr,
                                               kept ? kept + row * operands.rank : nullptr, scratch.get()});
      }
      if (sums)
        for (int64_t i = unit.first; i < unit.last; ++i)
          for (int64_t j = 0; j < shape.dim; ++j) sums[plan.order[i] * shape.dim + j] /= C(plan.tokens);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> surgery_adapter(Tensor features, Tensor down, Tensor up,
                                                   std::optional<Tensor> task_index, bool token_mean,
                                                   bool keep_hidden) {
  const Operands operands(features, down, up, task_index);
  const Shape& shape = operands.shape;
  const auto empty = [&](std::vector<int64_t> sizes) {
    return torch::stable::new_empty(features, sizes, operands.compute());
  };
  std::vector<int64_t> mean_sizes{0}, hidden_sizes{0};
  if (token_mean) {
    const auto sizes = features.sizes();
    mean_sizes.assign(sizes.begin(), sizes.end() - 2);
    mean_sizes.push_back(shape.dim);
  }
  if (keep_hidden) hidden_sizes = {shape.rows(), operands.rank};
  Tensor corrected = torch::stable::empty_like(features);
  ask_for_huge_pages(corrected);
  Tensor means = empty(mean_sizes), hidden = empty(hidden_sizes);
  if (operands.dtype == Dtype::f64)
    run_forward<int64_t>(operands, features, corrected, means, hidden);
  else
    run_forward<int32_t>(operands, features, corrected, means, hidden);
  return {corrected, means, hidden};
}

// The sums of a task's units, in their order: d_down [rank, dim] and d_up [dim, rank] of every task.
template <class Key>
void add_units(const Plan& plan, const Operands& operands, ComputeOf<Key>* sums, const Tensor& d_down,
               const Tensor& d_up) {
  using C = ComputeOf<Key>;
  const int64_t rank = operands.rank, dim = operands.shape.dim, width = padded(dim), size = 2 * rank * width;
  C* const to_down = static_cast<C*>(d_down.data_ptr());
  C* const to_up = static_cast<C*>(d_up.data_ptr());
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(size, 1));
  torch::stable::parallel_for(0, operands.num_tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      C* const down = to_down + t * rank * dim;
      C* const up = to_up + t * rank * dim;
      const auto [begin, end] = plan.units_of(t);
      if (begin == end) {
        std::fill_n(down, rank * dim, C(0));
        std::fill_n(up, rank * dim, C(0));
        continue;
      }
      C* const sum = sums + begin * size;
      for (int64_t u = begin + 1; u < end; ++u)
        for (int64_t i = 0; i < size; ++i) sum[i] += sums[u * size + i];
      for (int64_t r = 0; r < rank; ++r) std::copy_n(sum + r * width, dim, down + r * dim);
      for (int64_t strip = 0; strip < dim; strip += kPadding)
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t d = strip; d < std::min(strip + kPadding, dim); ++d)
            up[d * rank + r] = -sum[(rank + r) * width + d];
    }
  });
}

template <class Key>
void run_backward(const Operands& operands, const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_means,
                  const Tensor& features, const Tensor& hidden, const Tensor& d_features, const Tensor& d_down,
                  const Tensor& d_up, bool need_features, bool need_adapter) {
  using C = ComputeOf<Key>;
  const Shape& shape = operands.shape;
  const int64_t dim = shape.dim, rank = operands.rank, factor = rank * padded(dim);
  const Adapters<Key> adapters(operands, SK_KERNELS(adapter_kernels).pack_backward);
  const Plan plan = operands.plan();
  const Rows from(features, shape, operands.indexed), of_grad(grad ? *grad : features, shape, operands.indexed),
      to(need_features ? d_features : features, shape, operands.indexed);
  const C* const of_means = grad_means ? static_cast<const C*>(grad_means->data_ptr()) : nullptr;
  const C* const kept = static_cast<const C*>(hidden.data_ptr());
  const Buffer<C> sums(need_adapter ? int64_t(plan.units.size()) * 2 * factor : 0);  // of each unit
  plan.parallel([&](int64_t first_unit, int64_t last_unit) {
    const Buffer<C> scratch(block_scratch(dim, rank));
    std::array<const void*, kBlockRows> rows, grads;
    std::array<const C*, kBlockRows> mean_grads;
    std::array<void*, kBlockRows> outputs;
    for (int64_t u = first_unit; u < last_unit; ++u) {
      const Plan::Unit unit = plan.units[u];
      C* const sum = need_adapter ? sums.get() + u * 2 * factor : nullptr;
      if (sum) std::fill_n(sum, 2 * factor, C(0));
      for (int64_t row = unit.first * plan.tokens, end = unit.last * plan.tokens; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t sample = plan.order[(row + i) / plan.tokens], token = (row + i) % plan.tokens;
          rows[i] = from.row(sample, token);
          grads[i] = of_grad.row(sample, token);
          outputs[i] = to.row(sample, token);
          if (of_means) mean_grads[i] = of_means + sample * dim;
        }
        SK_KERNELS(adapter_kernels)
            .backward.get<Key>(operands.dtype)(
                {adapters.of(unit.task), count, grad ? grads.data() : nullptr, of_means ? mean_grads.data() : nullptr,
                 C(plan.tokens), need_adapter ? rows.data() : nullptr, kept + row * rank,
                 need_features ? outputs.data() : nullptr, sum, sum ? sum + factor : nullptr, scratch.get()});
      }
    }
  });
  if (need_adapter) add_units<Key>(plan, operands, sums.get(), d_down, d_up);
}

std::tuple<Tensor, Tensor, Tensor> surgery_adapter_backward(std::optional<Tensor> grad,
                                                            std::optional<Tensor> grad_means, Tensor features,
                                                            Tensor down, Tensor up, std::optional<Tensor> task_index,
                                                            Tensor hidden, bool need_features, bool need_adapter) {
  const Operands operands(features, down, up, task_index);
  const Shape& shape = operands.shape;
  if (grad) {
    check_same_shape(*grad, features, "grad");
    if (shape.dim > 1 && grad->stride(grad->dim() - 1) != 1) grad = torch::stable::contiguous(*grad);
  }
  if (grad_means) {
    require(grad_means->scalar_type() == operands.compute() && grad_means->numel() == shape.all_samples() * shape.dim,
            "grad_means must be one row for every sample");
    grad_means = torch::stable::contiguous(*grad_means);
  }
  require(hidden.scalar_type() == operands.compute() && hidden.is_contiguous() &&
              hidden.numel() == shape.rows() * operands.rank,
          "hidden must be what surgery_adapter kept");
  const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, std::vector<int64_t>{0}); };
  Tensor d_features = need_features ? torch::stable::empty_like(features) : none(features);
  ask_for_huge_pages(d_features);
  Tensor d_down = need_adapter ? torch::stable::empty_like(operands.down) : none(down);
  Tensor d_up = need_adapter ? torch::stable::empty_like(operands.up) : none(up);
  if (operands.dtype == Dtype::f64)
    run_backward<int64_t>(operands, grad, grad_means, features, hidden, d_features, d_down, d_up, need_features,
                          need_adapter);
  else
    run_backward<int32_t>(operands, grad, grad_means, features, hidden, d_features, d_down, d_up, need_features,
                          need_adapter);
  return {d_features, d_down, d_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("surgery_adapter", TORCH_BOX(&surgery_adapter));
  m.impl("surgery_adapter_backward", TORCH_BOX(&surgery_adapter_backward));
}

}  // namespace sk
