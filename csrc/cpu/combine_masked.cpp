#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "combine_blocks.h"
#include "combine_mask_kernel.h"
#include "inputs.h"

namespace sk {
namespace {

constexpr double kLeastMean = 1e-12;  // a mask of nothing is not scaled up to something
constexpr double kSharpest = 1e300;   // of temperature 0: every mask is 0 or 1
constexpr uint32_t kMaskStream = 0;   // the task_id of the words

// The arguments that forward and backward share, checked.
struct Masked {
  Inputs inputs;
  Blocks blocks;
  Pieces pieces;
  Tensor coefficients, logits;
  double temperature;
  std::optional<int64_t> seed;

  Masked(const Tensor& first, const std::vector<Tensor>& task_vectors, const Tensor& given_coefficients,
         const Tensor& block_offsets, const Tensor& mask_logits, double temperature, std::optional<int64_t> seed)
      : inputs({first}, task_vectors, task_vectors.size()),
        blocks(block_offsets, inputs.scope.numel),
        pieces(blocks),
        coefficients(torch::stable::contiguous(given_coefficients)),
        logits(torch::stable::contiguous(mask_logits)),
        temperature(temperature),
        seed(seed) {
    const ScalarType compute = inputs.wide ? ScalarType::Double : ScalarType::Float;
    require(coefficients.is_cpu() && coefficients.dim() == 2 && coefficients.size(0) == inputs.scope.num_tasks &&
                coefficients.size(1) == blocks.count,
            "coefficients must be [", inputs.scope.num_tasks, ", ", blocks.count,
            "] on the CPU, got another shape or device");
    require(coefficients.scalar_type() == compute, "coefficients must be in the compute type, got another dtype");
    require(logits.is_cpu() && logits.dim() == 1 && logits.numel() == inputs.scope.numel, "mask_logits must be [",
            inputs.scope.numel, "] on the CPU, got another shape or device");
    require(logits.scalar_type() == compute, "mask_logits must be in the compute type, got another dtype");
    require(std::isfinite(temperature) && temperature >= 0, "temperature must be finite and 0 or greater, got ",
            temperature);
  }

  MaskNoise noise(int64_t block) const {
    const double sharpness = temperature > 0 ? 1 / temperature : kSharpest;
    return {{uint64_t(seed.value_or(0)), uint32_t(block), kMaskStream}, seed.has_value(), sharpness};
  }

  template <class C>
  double draw(const Piece& piece, C* mask) const {
    const C* const from = static_cast<const C*>(logits.data_ptr()) + piece.begin;
    return SK_KERNELS(combine_mask_kernels).draw<C>()(from, noise(piece.block), piece.place, piece.count, mask);
  }
};

// What the kernels take of a piece, and what lives as long.
template <class Key>
struct OfPiece {
  using C = ComputeOf<Key>;
  std::vector<const void*> task_vectors;
  std::vector<C> coefficients;
  MaskedArgs<Key> args{};

  OfPiece(const Masked& merge, const Piece& piece, const C* mask, double mean) {
    const Part& part = merge.inputs.scope.parts[0];
    const C* const table = static_cast<const C*>(merge.coefficients.data_ptr());
    for (int64_t t = 0; t < merge.inputs.scope.num_tasks; ++t) {
      const C coefficient = table[t * merge.blocks.count + piece.block];
      // the payload of another NaN could carry into the sign when it is rounded to bfloat16
      coefficients.push_back(std::isnan(coefficient) ? std::numeric_limits<C>::quiet_NaN() : coefficient);
      task_vectors.push_back(part.expert_at(t, piece.begin));
    }
    args.base = part.base_at(piece.begin);
    args.task_vectors = task_vectors.data();
    args.coefficients = coefficients.data();
    args.num_tasks = int(coefficients.size());
    args.mask = mask;
    args.mean = C(mean < kLeastMean ? kLeastMean : mean);
    args.n = piece.count;
  }
};

template <class Key>
void merge_masked(const Masked& merge, double* means, const Tensor& out) {
  using C = ComputeOf<Key>;
  const Scope& scope = merge.inputs.scope;
  const Part& part = scope.parts[0];
  char* const to = static_cast<char*>(out.data_ptr());
  const bool kept = size_of(part.dtype) == int64_t(sizeof(C));  // the mask, where the result will be
  const auto place_of = [&](const Piece& piece, C* room) {
    return kept ? reinterpret_cast<C*>(to) + piece.begin : room;
  };
  std::vector<double> sums(size_t(merge.pieces.count()));
  merge.pieces.template parallel_with_room<C>([&](const Piece& piece, int64_t index, C* room) {
    sums[size_t(index)] = merge.draw<C>(piece, place_of(piece, room));
  });
  for (int64_t b = 0; b < merge.blocks.count; ++b)
    means[b] = merge.pieces.of_block(sums, b, 1)[0] / double(std::max<int64_t>(1, merge.blocks.size(b)));
  const auto kernel = SK_KERNELS(combine_mask_kernels).forward.template get<Key>(part.dtype);
  merge.pieces.template parallel_with_room<C>([&](const Piece& piece, int64_t, C* room) {
    C* const mask = place_of(piece, room);
    if (!kept) merge.draw<C>(piece, mask);
    const OfPiece<Key> of_piece(merge, piece, mask, means[piece.block]);
    kernel(of_piece.args, to + piece.begin * size_of(part.dtype));
    scope.report({part, 0, 0, piece.begin, piece.count});
  });
}

std::tuple<Tensor, Tensor> combine_masked(Tensor base, std::vector<Tensor> task_vectors, Tensor coefficients,
                                          Tensor block_offsets, Tensor mask_logits, double temperature,
                                          std::optional<int64_t> seed) {
  const Masked merge(base, task_vectors, coefficients, block_offsets, mask_logits, temperature, seed);
  const Tensor out = torch::stable::new_empty(base, base.sizes());
  const Tensor means = torch::stable::new_empty(base, {merge.blocks.count}, ScalarType::Double);
  ask_for_huge_pages(out);
  double* const of_block = static_cast<double*>(means.data_ptr());
  merge.inputs.wide ? merge_masked<int64_t>(merge, of_block, out) : merge_masked<int32_t>(merge, of_block, out);
  return {out, means};
}

template <class Key>
void differentiate_masked(const Masked& merge, const double* means, const Tensor& of_coefficients,
                          const Tensor& of_logits) {
  using C = ComputeOf<Key>;
  const Scope& scope = merge.inputs.scope;
  const Part& part = scope.parts[0];
  const int64_t num_tasks = scope.num_tasks, width = 1 + num_tasks;
  C* const pull = static_cast<C*>(of_logits.data_ptr());
  std::vector<double> sums(size_t(merge.pieces.count() * width));
  const auto backward = SK_KERNELS(combine_mask_kernels).backward.template get<Key>(part.dtype);
  merge.pieces.template parallel_with_room<C>([&](const Piece& piece, int64_t index, C* mask) {
    merge.draw<C>(piece, mask);
    const OfPiece<Key> of_piece(merge, piece, mask, means[piece.block]);
    backward(of_piece.args, pull + piece.begin, &sums[size_t(index * width)]);
    scope.report({part, 0, 0, piece.begin, piece.count});
  });
  std::vector<double> shifts(size_t(merge.blocks.count));
  C* const table = static_cast<C*>(of_coefficients.data_ptr());
  for (int64_t b = 0; b < merge.blocks.count; ++b) {
    const std::vector<double> of_block = merge.pieces.of_block(sums, b, width);
    // a mean that is not the mask's own does not move with it
    const double size = double(std::max<int64_t>(1, merge.blocks.size(b)));
    shifts[size_t(b)] = means[b] < kLeastMean ? 0.0 : of_block[0] / size / means[b];
    for (int64_t t = 0; t < num_tasks; ++t) table[t * merge.blocks.count + b] = C(of_block[size_t(1 + t)]);
  }
  const C sharpness = merge.temperature > 0 ? C(1 / merge.temperature) : C(0);  // a step is flat
  const auto logits = SK_KERNELS(combine_mask_kernels).template logits<C>();
  merge.pieces.template parallel_with_room<C>([&](const Piece& piece, int64_t, C* mask) {
    merge.draw<C>(piece, mask);
    const double mean = means[piece.block];
    const bool alone = merge.blocks.size(piece.block) == 1 && mean >= kLeastMean;  // scaled by 1 whatever its logit
    logits(mask, C(shifts[size_t(piece.block)]), C(mean < kLeastMean ? kLeastMean : mean), alone ? C(0) : sharpness,
           piece.count, pull + piece.begin);
  });
}

std::tuple<Tensor, Tensor> combine_masked_backward(Tensor grad, std::vector<Tensor> task_vectors, Tensor coefficients,
                                                   Tensor block_offsets, Tensor mask_logits, Tensor means,
                                                   double temperature, std::optional<int64_t> seed) {
  const Masked merge(grad, task_vectors, coefficients, block_offsets, mask_logits, temperature, seed);
  require(means.is_cpu() && means.scalar_type() == ScalarType::Double && means.dim() == 1 &&
              means.numel() == merge.blocks.count,
          "means must be float64 [", merge.blocks.count, "] on the CPU, got another dtype, shape or device");
  const Tensor contiguous = torch::stable::contiguous(means);
  const double* const of_block = static_cast<const double*>(contiguous.data_ptr());
  const ScalarType compute = merge.inputs.wide ? ScalarType::Double : ScalarType::Float;
  const Tensor of_coefficients =
      torch::stable::new_empty(grad, {merge.inputs.scope.num_tasks, merge.blocks.count}, compute);
  const Tensor of_logits = torch::stable::new_empty(grad, grad.sizes(), compute);
  ask_for_huge_pages(of_logits);
  merge.inputs.wide ? differentiate_masked<int64_t>(merge, of_block, of_coefficients, of_logits)
                    : differentiate_masked<int32_t>(merge, of_block, of_coefficients, of_logits);
  return {of_coefficients, of_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) {
  m.impl("combine_masked", TORCH_BOX(&combine_masked));
  m.impl("combine_masked_backward", TORCH_BOX(&combine_masked_backward));
}

}  // namespace sk
