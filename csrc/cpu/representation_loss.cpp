#include <torch/csrc/stable/library.h>

#include <tuple>

#include "inputs.h"
#include "representation_loss_kernel.h"

namespace sk {
namespace {

constexpr int64_t kWorthAThread = 1 << 17;  // elements: waiting for a second thread costs more than fewer take

// [..., rows, dim] as one mean after another, each cut into chunks of its own.
struct Means {
  std::vector<int64_t> sizes;  // [...]
  int64_t count = 1, numel, chunks;

  explicit Means(const Tensor& t) {
    require(t.dim() >= 2, "features must be [..., rows, dim], got ", t.dim(), " dimensions");
    for (int64_t d = 0; d < t.dim() - 2; ++d) sizes.push_back(t.size(d));
    for (const int64_t size : sizes) count *= size;
    numel = t.size(t.dim() - 2) * t.size(t.dim() - 1);
    chunks = (numel + kChunk - 1) / kChunk;
  }

  // Runs body(chunk, mean, begin, n) over all chunks; begin: among the elements of all means.
  template <class Body>
  void parallel(const Body& body) const {
    const int64_t grain = kWorthAThread / std::clamp<int64_t>(numel, 1, kChunk);
    torch::stable::parallel_for(0, count * chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const int64_t mean = c / chunks, begin = c % chunks * kChunk;
        body(c, mean, mean * numel + begin, std::min(kChunk, numel - begin));
      }
    });
  }
};

template <class Key>
std::tuple<Tensor, Tensor> forward(const Tensor& features, const Tensor& targets, bool with_signs) {
  using C = typename RepresentationLossKernel<Key>::C;
  const Means means(features);
  const Dtype dtype = dtype_of(features, "features");
  const auto run = SK_KERNELS(representation_loss_kernels).get<Key>(dtype).forward;
  const Tensor loss =
      torch::stable::new_empty(features, means.sizes, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
  const std::vector<int64_t> none{0};
  const Tensor signs = torch::stable::new_empty(features, with_signs ? features.sizes() : none, ScalarType::Char);
  ask_for_huge_pages(signs);

  std::vector<double> sums(size_t(means.count * means.chunks));  // [means, chunks]
  means.parallel([&](int64_t chunk, int64_t, int64_t begin, int64_t n) {
    const auto at = [&](const Tensor& t) { return static_cast<const char*>(t.data_ptr()) + begin * size_of(dtype); };
    int8_t* sign = with_signs ? static_cast<int8_t*>(signs.data_ptr()) + begin : nullptr;
    sums[size_t(chunk)] = run(at(features), at(targets), n, sign);
  });
  C* result = static_cast<C*>(loss.data_ptr());
  const double* sum = sums.data();
  for (int64_t m = 0; m < means.count; ++m) {
    double total = 0;
    for (int64_t c = 0; c < means.chunks; ++c) total += *sum++;
    result[m] = C(total / double(means.numel));  // NaN for the mean of nothing, as torch's
  }
  return {loss, signs};
}

void check_targets(const Tensor& targets, const Tensor& features) {
  require(targets.is_cpu() && features.is_cpu(), "targets must be on the CPU like features, got another device");
  require(targets.scalar_type() == features.scalar_type(), "targets must have the dtype of features, got another");
  require(has_shape(targets, features.sizes()), "targets must have the shape of features, got another");
}

std::tuple<Tensor, Tensor> representation_loss(Tensor features, Tensor targets, bool with_signs) {
  check_targets(targets, features);
  if (!features.is_contiguous()) features = torch::stable::contiguous(features);
  if (!targets.is_contiguous()) targets = torch::stable::contiguous(targets);
  return dtype_of(features, "features") == Dtype::f64 ? forward<int64_t>(features, targets, with_signs)
                                                      : forward<int32_t>(features, targets, with_signs);
}

template <class Key>
void backward(const Tensor& grad, const Tensor& signs, const Tensor& gradient) {
  using C = typename RepresentationLossKernel<Key>::C;
  const Means means(signs);
  const Dtype dtype = dtype_of(gradient, "dtype");
  const auto run = SK_KERNELS(representation_loss_kernels).get<Key>(dtype).backward;
  const bool stream = signs.numel() * size_of(dtype) > kStreamBytes;
  means.parallel([&](int64_t, int64_t mean, int64_t begin, int64_t n) {
    const C scale = static_cast<const C*>(grad.data_ptr())[mean] / C(means.numel);
    run(static_cast<const int8_t*>(signs.data_ptr()) + begin, n, scale, stream,
        static_cast<char*>(gradient.data_ptr()) + begin * size_of(dtype));
  });
}

Tensor representation_loss_backward(Tensor grad, Tensor signs, ScalarType dtype) {
  const Means means(signs);
  require(grad.is_cpu() && signs.is_cpu(), "signs must be on the CPU like grad, got another device");
  require(signs.scalar_type() == ScalarType::Char, "signs must be int8, got another dtype");
  require(grad.numel() == means.count, "grad must be one value for each of ", means.count, " means, got ",
          grad.numel());
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(grad.scalar_type() == wide,
          "grad must be float64 for float64 features and float32 for others, got another dtype");
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  if (!signs.is_contiguous()) signs = torch::stable::contiguous(signs);
  const Tensor gradient = torch::stable::new_empty(signs, signs.sizes(), dtype);
  ask_for_huge_pages(gradient);
  dtype == ScalarType::Double ? backward<int64_t>(grad, signs, gradient) : backward<int32_t>(grad, signs, gradient);
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("representation_loss", TORCH_BOX(&representation_loss));
  m.impl("representation_loss_backward", TORCH_BOX(&representation_loss_backward));
}

}  // namespace sk
