#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "combine_blocks.h"
#include "combine_kernel.h"
#include "inputs.h"
#include "mix_kernel.h"

namespace sk {
namespace {

std::vector<const void*> pointers_at(const Part& part, int64_t i) {
  std::vector<const void*> pointers;
  for (size_t t = 0; t < part.experts.size(); ++t) pointers.push_back(part.expert_at(int64_t(t), i));
  return pointers;
}

template <class Key>
void combine_scope(const Scope& scope, const Blocks& blocks, const Tensor& coefficients, const Tensor& out) {
  using C = typename MixArgs<Key>::C;
  const Part& part = scope.parts[0];
  const auto& kernel = SK_KERNELS(mix_kernels).uniform.get<Key>(part.dtype);
  const C* const coefficient = static_cast<const C*>(coefficients.data_ptr());
  char* const out_begin = static_cast<char*>(out.data_ptr());
  const bool stream = scope.numel * size_of(part.dtype) > kStreamBytes;
  scope.parallel([&](int64_t first, int64_t last) {
    std::vector<C> weights(part.experts.size());
    for (int64_t c = first; c < last; ++c) {
      const Chunk chunk = scope.chunk(c);
      blocks.each_piece(chunk.begin, chunk.begin + chunk.count, [&](int64_t block, int64_t begin, int64_t count) {
        for (size_t t = 0; t < weights.size(); ++t) {
          const C weight = coefficient[int64_t(t) * blocks.count + block];
          // the payload of another NaN could carry into the sign when it is rounded to bfloat16
          weights[t] = std::isnan(weight) ? std::numeric_limits<C>::quiet_NaN() : weight;
        }
        const std::vector<const void*> task_vectors = pointers_at(part, begin);
        MixArgs<Key> args{};
        args.base = part.base_at(begin);
        args.experts = task_vectors.data();
        args.coefficients = weights.data();
        args.num_outputs = 1;
        args.num_tasks = int(weights.size());
        args.n = count;
        args.divisor = 1;
        args.stream = stream;
        void* const out_piece = out_begin + begin * size_of(part.dtype);
        kernel(args, &out_piece);
      });
      scope.report(chunk);
    }
  });
}

Tensor combine(Tensor base, std::vector<Tensor> task_vectors, Tensor coefficients, Tensor block_offsets) {
  const Inputs inputs({base}, task_vectors, task_vectors.size());
  const Blocks blocks(block_offsets, inputs.scope.numel);
  const int64_t num_tasks = inputs.scope.num_tasks;
  require(coefficients.is_cpu() && coefficients.dim() == 2 && coefficients.size(0) == num_tasks &&
              coefficients.size(1) == blocks.count,
          "coefficients must be [", num_tasks, ", ", blocks.count, "] on the CPU, got another shape or device");
  require(coefficients.scalar_type() == (inputs.wide ? ScalarType::Double : ScalarType::Float),
          "coefficients must be in the compute type, got another dtype");
  const Tensor contiguous = torch::stable::contiguous(coefficients);
  const Tensor out = torch::stable::new_empty(base, base.sizes());
  ask_for_huge_pages(out);
  inputs.wide ? combine_scope<int64_t>(inputs.scope, blocks, contiguous, out)
              : combine_scope<int32_t>(inputs.scope, blocks, contiguous, out);
  return out;
}

// Chunks meet in the blocks that span them: the first piece of such a block, at the end of a chunk, and the others, at
// the beginning of one, wait here until all of them are known and are added up in order.
struct Partials {
  int64_t num_tasks;
  std::vector<double> values;  // [num_chunks, 2, num_tasks]

  explicit Partials(const Scope& scope)
      : num_tasks(scope.num_tasks), values(size_t(2 * scope.num_chunks * scope.num_tasks)) {}
  double* continued(int64_t chunk) { return &values[size_t(2 * chunk * num_tasks)]; }
  double* begun(int64_t chunk) { return &values[size_t((2 * chunk + 1) * num_tasks)]; }
};

template <class Key>
void differentiate_scope(const Scope& scope, const Blocks& blocks, const Tensor& out) {
  using C = typename MixArgs<Key>::C;
  const Part& part = scope.parts[0];
  const int num_tasks = int(scope.num_tasks);
  C* const gradient = static_cast<C*>(out.data_ptr());
  const auto store = [&](int64_t block, const double* sums) {
    for (int t = 0; t < num_tasks; ++t) gradient[t * blocks.count + block] = C(sums[t]);
  };
  Partials partials(scope);
  const auto& kernel = SK_KERNELS(dot_kernels).get<Key>(part.dtype);
  scope.parallel([&](int64_t first, int64_t last) {
    std::vector<double> whole(static_cast<size_t>(num_tasks));
    for (int64_t c = first; c < last; ++c) {
      const Chunk chunk = scope.chunk(c);
      const int64_t end = chunk.begin + chunk.count;
      blocks.each_piece(chunk.begin, end, [&](int64_t block, int64_t begin, int64_t count) {
        double* const sums = blocks.offsets[block] < chunk.begin ? partials.continued(c)
                             : blocks.offsets[block + 1] > end   ? partials.begun(c)
                                                                 : whole.data();
        kernel(part.base_at(begin), pointers_at(part, begin).data(), num_tasks, count, sums);
        if (sums == whole.data()) store(block, sums);
      });
      scope.report(chunk);
    }
  });
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = blocks.offsets[block] / kChunk, last = (blocks.offsets[block + 1] - 1) / kChunk;
    if (first >= last) continue;  // also the empty ones
    double* const sums = partials.begun(first);
    for (int64_t c = first + 1; c <= last; ++c)
      for (int t = 0; t < num_tasks; ++t) sums[t] += partials.continued(c)[t];
    store(block, sums);
  }
}

Tensor combine_backward(Tensor grad, std::vector<Tensor> task_vectors, Tensor block_offsets) {
  const Inputs inputs({grad}, task_vectors, task_vectors.size());
  const Blocks blocks(block_offsets, inputs.scope.numel);
  const Tensor out = torch::stable::new_zeros(grad, {inputs.scope.num_tasks, blocks.count},
                                              inputs.wide ? ScalarType::Double : ScalarType::Float);
  inputs.wide ? differentiate_scope<int64_t>(inputs.scope, blocks, out)
              : differentiate_scope<int32_t>(inputs.scope, blocks, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace sk
