#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

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
    require(int64_t(given.size()) == num_tasks && num_tasks > 0, name, " must be one tensor per task, got ",
            given.size(), " for ", num_tasks, " tasks");
    dtype = dtype_of(given[0], name);
    for (const Tensor& t : given) {
      require(t.is_cpu() && t.dim() == 2 && t.size(1) == dim, name, " must be [images, ", dim, "] on the CPU");
      require(dtype_of(t, name) == dtype, name, " must have one dtype, got several");
      tensors.push_back(torch::stable::contiguous(t));
    }
  }
};

template <class C>
C* parameter(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  const ScalarType compute = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;
  require(t.is_cpu() && t.is_contiguous() && t.scalar_type() == compute, name,
          " must be contiguous float32 (float64 for float64 features) on the CPU");
  bool same = t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  require(same, name, " must have the shape that down implies, got another");
  return static_cast<C*>(t.data_ptr());
}

struct Adam {
  int64_t step;  // taken before
  double lr, beta1, beta2, eps;
  int64_t zero_grad_steps;
};

template <class C>
std::vector<AdamStep<C>> bias_corrections(const Adam& adam, int64_t steps) {
  std::vector<AdamStep<C>> corrections;
  for (int64_t i = 1; i <= steps * (1 + adam.zero_grad_steps); ++i) {
    const double t = double(adam.step + i);
    corrections.push_back({C(adam.lr / (1 - std::pow(adam.beta1, t))), C(1 / std::sqrt(1 - std::pow(adam.beta2, t)))});
  }
  return corrections;
}

template <class Key>
Tensor run(const Cache& features, const Cache& targets, const Tensor& down, const Tensor& up,
           const Tensor& down_moments, const Tensor& up_moments, const Tensor& indices, const Adam& adam) {
  using C = ComputeOf<Key>;
  const int64_t num_tasks = down.size(0), rank = down.size(1), dim = down.size(2), size = rank * dim;
  const int64_t steps = indices.size(0), batch = indices.size(2);
  C* const down_at = parameter<C>(down, "down", {num_tasks, rank, dim});
  C* const up_at = parameter<C>(up, "up", {num_tasks, dim, rank});
  C* const down_moments_at = parameter<C>(down_moments, "down_moments", {2, num_tasks, rank, dim});
  C* const up_moments_at = parameter<C>(up_moments, "up_moments", {2, num_tasks, dim, rank});
  const std::vector<AdamStep<C>> corrections = bias_corrections<C>(adam, steps);
  const int64_t* const images = static_cast<const int64_t*>(indices.data_ptr());
  Tensor losses = torch::stable::new_empty(down, std::vector<int64_t>{steps, num_tasks});
  const int64_t work = steps * batch * size, grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(work, 1));
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t first, int64_t last) {
    const Buffer<C> scratch(train_scratch(dim, rank));
    for (int64_t t = first; t < last; ++t) {
      const auto moving = [&](C* value, C* moments) {
        return Moving<C>{value + t * size, moments + t * size, moments + (num_tasks + t) * size};
      };
      SK_KERNELS(surgery_train_kernels)
          .get<Key>(features.dtype)({dim, rank, steps, batch, features.tensors[t].data_ptr(),
                                     targets.tensors[t].data_ptr(), images + t * batch, num_tasks * batch,
                                     moving(down_at, down_moments_at), moving(up_at, up_moments_at), corrections.data(),
                                     adam.zero_grad_steps, C(adam.beta1), C(adam.beta2), C(adam.eps),
                                     static_cast<C*>(losses.data_ptr()) + t, num_tasks, scratch.get()});
    }
  });
  return losses;
}

Tensor surgery_train(std::vector<Tensor> features, std::vector<Tensor> targets, Tensor down, Tensor up,
                     Tensor down_moments, Tensor up_moments, Tensor indices, int64_t step, double lr, double beta1,
                     double beta2, double eps, int64_t zero_grad_steps) {
  require(down.dim() == 3, "down must have 3 dimensions");
  const int64_t num_tasks = down.size(0), dim = down.size(2);
  const Cache from(features, "features", num_tasks, dim), to(targets, "targets", num_tasks, dim);
  require(from.dtype == to.dtype, "targets must have the dtype of features, got another");
  require(indices.is_cpu() && indices.scalar_type() == ScalarType::Long && indices.dim() == 3 &&
              indices.size(1) == num_tasks && indices.size(2) > 0,
          "indices must be int64 [steps, ", num_tasks, ", batch] on the CPU");
  indices = torch::stable::contiguous(indices);
  const int64_t batch = indices.size(2);
  const int64_t* const images = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t t = 0; t < num_tasks; ++t)
    require(to.tensors[t].size(0) == from.tensors[t].size(0), "targets[", t, "] must have the images of features[", t,
            "], ", from.tensors[t].size(0), ", got ", to.tensors[t].size(0));
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t task = i / batch % num_tasks, count = from.tensors[task].size(0);
    require(0 <= images[i] && images[i] < count, "indices must be in [0, ", count, ") for task ", task, ", got ",
            images[i]);
  }
  const Adam adam = {step, lr, beta1, beta2, eps, zero_grad_steps};
  return (from.dtype == Dtype::f64 ? run<int64_t> : run<int32_t>)(from, to, down, up, down_moments, up_moments, indices,
                                                                  adam);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("surgery_train", TORCH_BOX(&surgery_train)); }

}  // namespace sk
