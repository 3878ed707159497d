#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "combine_blocks.h"
#include "combine_groups_kernel.h"
#include "inputs.h"

namespace sk {
namespace {

constexpr uint32_t kGroupsStream = 1;  // the task_id of the words

void check_num_groups(int64_t num_groups) {
  require(num_groups >= 1 && num_groups <= kMostGroups, "coefficients must be of 1 to ", kMostGroups,
          " groups of every block, got ", num_groups);
}

// What the kernels take of a piece, and what lives as long.
template <class Key>
struct OfPiece {
  std::vector<const void*> task_vectors;
  GroupsArgs<Key> args{};

  OfPiece(const Scope& scope, const Piece& piece, int64_t num_groups, int64_t seed) {
    const Part& part = scope.parts[0];
    for (int64_t t = 0; t < scope.num_tasks; ++t) task_vectors.push_back(part.expert_at(t, piece.begin));
    args.base = part.base_at(piece.begin);
    args.task_vectors = task_vectors.data();
    args.num_tasks = int(scope.num_tasks);
    args.num_groups = int(num_groups);
    args.stream = {uint64_t(seed), uint32_t(piece.block), kGroupsStream};
    args.first = piece.place;
    args.n = piece.count;
  }
};

template <class Key>
void merge_grouped(const Scope& scope, const Blocks& blocks, const Tensor& coefficients, int64_t seed,
                   const Tensor& out) {
  using C = ComputeOf<Key>;
  const Part& part = scope.parts[0];
  const int64_t num_groups = coefficients.size(2);
  const C* const table = static_cast<const C*>(coefficients.data_ptr());
  const auto kernel = SK_KERNELS(combine_groups_kernels).forward.template get<Key>(part.dtype);
  const Pieces pieces(blocks);
  pieces.parallel([&](const Piece& piece, int64_t) {
    std::vector<C> of_block;  // [num_tasks, num_groups]
    for (int64_t t = 0; t < scope.num_tasks; ++t)
      for (int64_t k = 0; k < num_groups; ++k) {
        const C coefficient = table[(t * blocks.count + piece.block) * num_groups + k];
        // the payload of another NaN could carry into the sign when it is rounded to bfloat16
        of_block.push_back(std::isnan(coefficient) ? std::numeric_limits<C>::quiet_NaN() : coefficient);
      }
    OfPiece<Key> of_piece(scope, piece, num_groups, seed);
    of_piece.args.coefficients = of_block.data();
    kernel(of_piece.args, static_cast<char*>(out.data_ptr()) + piece.begin * size_of(part.dtype));
    scope.report({part, 0, 0, piece.begin, piece.count});
  });
}

Tensor combine_grouped(Tensor base, std::vector<Tensor> task_vectors, Tensor coefficients, Tensor block_offsets,
                       int64_t seed) {
  const Inputs inputs({base}, task_vectors, task_vectors.size());
  const Blocks blocks(block_offsets, inputs.scope.numel);
  const int64_t num_tasks = inputs.scope.num_tasks;
  require(coefficients.is_cpu() && coefficients.dim() == 3 && coefficients.size(0) == num_tasks &&
              coefficients.size(1) == blocks.count,
          "coefficients must be [", num_tasks, ", ", blocks.count, ", groups] on the CPU, got another shape or device");
  check_num_groups(coefficients.size(2));
  require(coefficients.scalar_type() == (inputs.wide ? ScalarType::Double : ScalarType::Float),
          "coefficients must be in the compute type, got another dtype");
  const Tensor contiguous = torch::stable::contiguous(coefficients);
  const Tensor out = torch::stable::new_empty(base, base.sizes());
  ask_for_huge_pages(out);
  inputs.wide ? merge_grouped<int64_t>(inputs.scope, blocks, contiguous, seed, out)
              : merge_grouped<int32_t>(inputs.scope, blocks, contiguous, seed, out);
  return out;
}

template <class Key>
void differentiate_grouped(const Scope& scope, const Blocks& blocks, int64_t num_groups, int64_t seed,
                           const Tensor& out) {
  using C = ComputeOf<Key>;
  const Part& part = scope.parts[0];
  const int64_t width = scope.num_tasks * num_groups;
  const auto kernel = SK_KERNELS(combine_groups_kernels).backward.template get<Key>(part.dtype);
  const Pieces pieces(blocks);
  std::vector<double> sums(size_t(pieces.count() * width));
  pieces.parallel([&](const Piece& piece, int64_t index) {
    const OfPiece<Key> of_piece(scope, piece, num_groups, seed);
    kernel(of_piece.args, &sums[size_t(index * width)]);
    scope.report({part, 0, 0, piece.begin, piece.count});
  });
  C* const table = static_cast<C*>(out.data_ptr());
  for (int64_t b = 0; b < blocks.count; ++b) {
    const std::vector<double> of_block = pieces.of_block(sums, b, width);
    for (int64_t t = 0; t < scope.num_tasks; ++t)
      for (int64_t k = 0; k < num_groups; ++k)
        table[(t * blocks.count + b) * num_groups + k] = C(of_block[size_t(t * num_groups + k)]);
  }
}

Tensor combine_grouped_backward(Tensor grad, std::vector<Tensor> task_vectors, Tensor block_offsets, int64_t num_groups,
                                int64_t seed) {
  const Inputs inputs({grad}, task_vectors, task_vectors.size());
  const Blocks blocks(block_offsets, inputs.scope.numel);
  check_num_groups(num_groups);
  const Tensor out = torch::stable::new_empty(grad, {inputs.scope.num_tasks, blocks.count, num_groups},
                                              inputs.wide ? ScalarType::Double : ScalarType::Float);
  inputs.wide ? differentiate_grouped<int64_t>(inputs.scope, blocks, num_groups, seed, out)
              : differentiate_grouped<int32_t>(inputs.scope, blocks, num_groups, seed, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("combine_grouped", TORCH_BOX(&combine_grouped));
  m.impl("combine_grouped_backward", TORCH_BOX(&combine_grouped_backward));
}

}  // namespace sk
