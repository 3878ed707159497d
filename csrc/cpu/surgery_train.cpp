#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <utility>

#include "../check.h"
#include "buffer.h"
#include "surgery_train_kernel.h"

namespace sk {
namespace {

// One [images, dim] tensor per task.
struct Cache {
  std::vector<Tensor> tensors;
  Dtype dtype;

  Cache(const std::vector<Tensor>& given, const std::string& name, int64_t num_tasks, int64_t dim) {
    require(int64_t(given.size()) == num_tasks && num_tasks > 0, name, " must be one tensor per task, ", num_tasks,
            ", got ", given.size());
    dtype = dtype_of(given[0], name);
    for (const Tensor& t : given) {
      require(t.is_cpu() && t.dim() == 2 && t.size(1) == dim, name, " must be [images, ", dim,
              "] on the CPU, got another shape or device");
      require(dtype_of(t, name) == dtype, name, " must have one dtype, got several");
      tensors.push_back(torch::stable::contiguous(t));
    }
  }
};

// The adapters of all tasks and Adam's moments, all moved in place.
struct Parameters {
  Tensor down, up, down_moments, up_moments;
  int64_t num_tasks, rank, dim;

  Parameters(const Tensor& down, const Tensor& up, const Tensor& down_moments, const Tensor& up_moments)
      : down(down), up(up), down_moments(down_moments), up_moments(up_moments) {
    require(down.dim() == 3, "down must be [num_tasks, rank, dim], got ", down.dim(), " dimensions");
    num_tasks = down.size(0), rank = down.size(1), dim = down.size(2);
    check(down, "down", {num_tasks, rank, dim});
    check(up, "up", {num_tasks, dim, rank});
    check(down_moments, "down_moments", {2, num_tasks, rank, dim});
    check(up_moments, "up_moments", {2, num_tasks, dim, rank});
  }

  // Tasks and factors are written one after the other, each read before.
  void check_apart_from(const std::vector<const Tensor*>& inputs) const {
    const std::vector<std::pair<const char*, const Tensor*>> moved = {
        {"down", &down}, {"up", &up}, {"down_moments", &down_moments}, {"up_moments", &up_moments}};
    const auto require_apart = [](const char* name, const Tensor& t, const Tensor& other) {
      const Extent a = extent(t), b = extent(other);
      require(a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin, name,
              " must be apart from every other tensor, got memory that overlaps one");
    };
    for (size_t i = 0; i < moved.size(); ++i) {
      for (size_t j = 0; j < i; ++j) require_apart(moved[i].first, *moved[i].second, *moved[j].second);
      for (const Tensor* input : inputs) require_apart(moved[i].first, *moved[i].second, *input);
    }
  }

  template <class C>
  Moving<C> of(int64_t task, const Tensor& value, const Tensor& moments) const {
    C* const at = static_cast<C*>(moments.data_ptr()) + task * rank * dim;
    return {static_cast<C*>(value.data_ptr()) + task * rank * dim, at, at + num_tasks * rank * dim};
  }

 private:
  void check(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) const {
    require(t.is_cpu() && t.is_contiguous() && t.scalar_type() == down.scalar_type(), name,
            " must be contiguous on the CPU in the dtype of down, got another tensor");
    require(has_shape(t, sizes), name, " must have the shape that down implies, got another");
  }
};

struct AdamOptions {
  int64_t step;  // taken before
  double lr, beta1, beta2, eps;
  int64_t zero_grad_steps;
};

// In float64: 1 - beta2^t cancels nearly all of float32's digits.
template <class C>
std::vector<AdamStep<C>> bias_corrections(const AdamOptions& adam, int64_t steps) {
  std::vector<AdamStep<C>> corrections;
  for (int64_t i = 1; i <= steps * (1 + adam.zero_grad_steps); ++i) {
    const double t = double(adam.step + i);
    corrections.push_back({C(adam.lr / (1 - std::pow(adam.beta1, t))), C(1 / std::sqrt(1 - std::pow(adam.beta2, t)))});
  }
  return corrections;
}

template <class Key>
Tensor run(const Cache& features, const Cache& targets, const Parameters& parameters, const Tensor& indices,
           const AdamOptions& options) {
  using C = ComputeOf<Key>;
  const int64_t num_tasks = parameters.num_tasks, rank = parameters.rank, dim = parameters.dim;
  const int64_t steps = indices.size(0), batch = indices.size(2);
  const auto train = SK_KERNELS(surgery_train_kernels).get<Key>(features.dtype);
  const std::vector<AdamStep<C>> corrections = bias_corrections<C>(options, steps);
  const auto decay = [](double beta) { return Decay<C>{C(beta), C(1 - beta)}; };
  const Adam<C> adam = {decay(options.beta1), decay(options.beta2), C(options.eps), options.zero_grad_steps,
                        corrections.data()};
  Tensor losses = torch::stable::new_empty(parameters.down, std::vector<int64_t>{steps, num_tasks});
  const int64_t work = steps * batch * rank * dim, grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(work, 1));
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t first, int64_t last) {
    const Buffer<C> scratch(train_scratch(dim, rank));
    for (int64_t t = first; t < last; ++t)
      train({dim, rank, steps, batch, features.tensors[t].data_ptr(), targets.tensors[t].data_ptr(),
             static_cast<const int64_t*>(indices.data_ptr()) + t * batch, num_tasks * batch,
             parameters.of<C>(t, parameters.down, parameters.down_moments),
             parameters.of<C>(t, parameters.up, parameters.up_moments), adam, static_cast<C*>(losses.data_ptr()) + t,
             num_tasks, scratch.get()});
  });
  return losses;
}

void check_indices(const Tensor& indices, const Cache& features) {
  const int64_t num_tasks = int64_t(features.tensors.size()), batch = indices.size(2);
  const int64_t* const images = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t task = i / batch % num_tasks, count = features.tensors[task].size(0);
    require(0 <= images[i] && images[i] < count, "indices must be in [0, ", count, ") for task ", task, ", got ",
            images[i]);
  }
}

Tensor surgery_train(std::vector<Tensor> features, std::vector<Tensor> targets, Tensor down, Tensor up,
                     Tensor down_moments, Tensor up_moments, Tensor indices, int64_t step, double lr, double beta1,
                     double beta2, double eps, int64_t zero_grad_steps) {
  const Parameters parameters(down, up, down_moments, up_moments);
  const Cache from(features, "features", parameters.num_tasks, parameters.dim);
  const Cache to(targets, "targets", parameters.num_tasks, parameters.dim);
  require(from.dtype == to.dtype, "targets must have the dtype of features, got another");
  for (size_t t = 0; t < features.size(); ++t)
    require(to.tensors[t].size(0) == from.tensors[t].size(0), "targets[", t, "] must have the images of features[", t,
            "], ", from.tensors[t].size(0), ", got ", to.tensors[t].size(0));
  const bool wide = from.dtype == Dtype::f64;
  require(down.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
          "down must be float32, or float64 for float64 features, got another dtype");
  require(indices.is_cpu() && indices.scalar_type() == ScalarType::Long && indices.dim() == 3 &&
              indices.size(1) == parameters.num_tasks && indices.size(2) > 0,
          "indices must be int64 [steps, ", parameters.num_tasks, ", batch] on the CPU, got another tensor");
  constexpr int64_t kMostZeroGradSteps = 1 << 20;  // they index a table
  require(0 <= zero_grad_steps && zero_grad_steps <= kMostZeroGradSteps, "zero_grad_steps must be in [0, ",
          kMostZeroGradSteps, "], got ", zero_grad_steps);
  indices = torch::stable::contiguous(indices);
  std::vector<const Tensor*> inputs = {&indices};
  for (const Cache* cache : {&from, &to})
    for (const Tensor& t : cache->tensors) inputs.push_back(&t);
  parameters.check_apart_from(inputs);
  check_indices(indices, from);
  const AdamOptions options = {step, lr, beta1, beta2, eps, zero_grad_steps};
  return (wide ? run<int64_t> : run<int32_t>)(from, to, parameters, indices, options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("surgery_train", TORCH_BOX(&surgery_train)); }

}  // namespace sk
