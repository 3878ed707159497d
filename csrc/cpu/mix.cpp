#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <optional>

#include "../trim_options.h"
#include "finite.h"
#include "inputs.h"
#include "mix_kernel.h"

namespace sk {
namespace {

enum class Axis { tensor, row, column };

// Which coefficients the elements of a tensor take: row r of `width` elements block first + r; by column, element i of
// every row block first + i.
struct Place {
  int64_t first, width;
  bool by_column;
};

// Blocks of all tensors in order: the tensors, their rows (of the last dimension) or their columns (of the tensor seen
// as [size(0), numel / size(0)]). A tensor of one dimension or none is one row, and has one column's coefficients.
struct Places {
  std::vector<Place> of_part;
  int64_t num_blocks = 0;

  Places(Axis axis, const std::vector<Tensor>& experts, size_t num_tasks) {
    for (size_t i = 0; i < experts.size(); i += num_tasks) {
      const Tensor& t = experts[i];
      const bool flat = axis == Axis::tensor || t.dim() < 2, by_column = !flat && axis == Axis::column;
      int64_t columns = flat ? 1 : t.size(t.dim() - 1), rows = 1;
      for (int64_t d = 0; !flat && d < t.dim() - 1; ++d) (d > 0 && by_column ? columns : rows) *= t.size(d);
      of_part.push_back({num_blocks, flat ? t.numel() : columns, by_column});
      num_blocks += by_column ? columns : rows;
    }
  }

  // One block for everything.
  void merge() {
    for (Place& place : of_part) place = {0, std::numeric_limits<int64_t>::max(), false};
    num_blocks = 1;
  }
};

// Coefficients in the compute type. The payload of another NaN than this could carry into the sign when it is rounded
// to bfloat16.
template <class C>
std::vector<C> numbers_of(const Tensor& coefficients) {
  const Tensor contiguous = torch::stable::contiguous(coefficients);
  const double* const first = static_cast<const double*>(contiguous.data_ptr());
  std::vector<C> numbers(first, first + contiguous.numel());
  for (C& number : numbers)
    if (std::isnan(number)) number = std::numeric_limits<C>::quiet_NaN();
  return numbers;
}

template <class Key>
struct Mix {
  using C = typename MixArgs<Key>::C;

  const Places& places;
  std::vector<C> coefficients;       // [num_outputs, num_tasks, num_blocks]
  std::vector<C> base_coefficients;  // [num_outputs, num_blocks], or empty
  size_t num_outputs;
  MixArgs<Key> args;  // but for what changes from run to run

  // Whether it saw what is not finite, where it looks; then some of the outputs are not filled.
  bool run(const Scope& scope, const Outputs& outputs) const {
    std::atomic<bool> found{false};
    scope.parallel([&](int64_t first, int64_t last) {
      std::vector<C> row(num_outputs * size_t(args.num_tasks)), base_row(num_outputs);
      std::vector<const void*> experts(size_t(args.num_tasks));
      std::vector<void*> out(num_outputs);
      for (int64_t c = first; c < last && !found.load(std::memory_order_relaxed); ++c) {
        const Chunk chunk = scope.chunk(c);
        const Place& place = places.of_part[chunk.part_index];
        const auto& kernels = place.by_column ? SK_KERNELS(mix_kernels).by_column : SK_KERNELS(mix_kernels).uniform;
        const auto& kernel = kernels.template get<Key>(chunk.part.dtype);
        int64_t block = -1;  // of what lies in `row`
        for (int64_t i = chunk.begin, end = chunk.begin + chunk.count, stop; i < end; i = stop) {
          const int64_t r = i / place.width;
          stop = std::min(end - r * place.width, place.width) + r * place.width;
          for (size_t t = 0; t < experts.size(); ++t) experts[t] = chunk.part.expert_at(int64_t(t), i);
          for (size_t j = 0; j < out.size(); ++j) out[j] = outputs.at(scope, chunk.part_index, i, j);
          MixArgs<Key> of_run = args;
          of_run.base = chunk.part.base_at(i);
          of_run.experts = experts.data();
          of_run.n = stop - i;
          of_run.stream = scope.numel * args.num_outputs * size_of(chunk.part.dtype) > kStreamBytes;
          if (place.by_column) {
            const int64_t column = place.first + i - r * place.width;
            of_run.coefficients = coefficients.data() + column;
            if (!base_coefficients.empty()) of_run.base_coefficients = base_coefficients.data() + column;
          } else {
            if (block != place.first + r) gather(block = place.first + r, row, base_row);
            of_run.coefficients = row.data();
            if (!base_coefficients.empty()) of_run.base_coefficients = base_row.data();
          }
          if (kernel(of_run, out.data()) && args.look) found.store(true, std::memory_order_relaxed);
        }
        scope.report(chunk);
      }
    });
    return found.load();
  }

  void gather(int64_t block, std::vector<C>& row, std::vector<C>& base_row) const {
    for (size_t k = 0; k < row.size(); ++k) row[k] = coefficients[k * size_t(args.stride) + size_t(block)];
    for (size_t j = 0; j < base_row.size() && !base_coefficients.empty(); ++j)
      base_row[j] = base_coefficients[j * size_t(args.stride) + size_t(block)];
  }
};

// What is read is finite, and so are the task vectors where they are what is summed.
template <class Key>
void check_finite(const Scope& scope, bool task_vectors, const std::vector<std::string>& names) {
  if (task_vectors || !scope.parts[0].base) return check_finite<Key>(scope, names);
  Scope base, experts;
  base.num_tasks = 1;
  experts.num_tasks = scope.num_tasks;
  for (const Part& part : scope.parts) {
    base.add(part.dtype, part.numel, part.base, {part.base});
    experts.add(part.dtype, part.numel, nullptr, part.experts);
  }
  check_finite<Key>(base, names);
  check_finite<Key>(experts, names);
}

void mix_out(std::vector<Tensor> base, std::vector<Tensor> experts, Tensor coefficients,
             std::optional<Tensor> base_coefficients, double divisor, bool task_vectors, bool fused,
             std::string axis_name, std::string nonfinite_name, std::optional<std::vector<std::string>> names,
             bool fresh, std::vector<Tensor> out) {
  const Axis axis = Axis(one_of("axis", axis_name, {"tensor", "row", "column"}));
  const NonFinite nonfinite = parse_nonfinite(nonfinite_name);
  require(coefficients.is_cpu() && coefficients.dim() == 3 && coefficients.scalar_type() == ScalarType::Double,
          "coefficients must be float64 [num_outputs, num_tasks, num_blocks] on the CPU, got another dtype, shape or "
          "device");
  const int64_t num_outputs = coefficients.size(0), num_blocks = coefficients.size(2);
  require(divisor != 0, "divisor must not be 0, got 0");
  require(num_outputs > 0, "coefficients must be of at least one output, got none");
  const Inputs inputs(base, experts, size_t(coefficients.size(1)));
  Places places(axis, experts, size_t(coefficients.size(1)));
  require(num_blocks == 1 || num_blocks == places.num_blocks, "coefficients must be of 1 block or of ",
          places.num_blocks, ", got ", num_blocks);
  if (num_blocks == 1) places.merge();
  if (base_coefficients) {
    require(!base.empty(), "base_coefficients must be None without base, got a tensor");
    require(base_coefficients->is_cpu() && base_coefficients->scalar_type() == ScalarType::Double &&
                has_shape(*base_coefficients, {num_outputs, num_blocks}),
            "base_coefficients must be float64 [", num_outputs, ", ", num_blocks,
            "] on the CPU, got another dtype, shape or device");
  }
  Outputs outputs(out, base, experts, size_t(coefficients.size(1)), size_t(num_outputs), /*in_place=*/true);
  const auto mix = [&](auto key) {
    using Key = decltype(key);
    using C = typename MixArgs<Key>::C;
    const auto check = [&] {
      check_finite<Key>(inputs.scope, task_vectors, names.value_or(std::vector<std::string>()));
    };
    MixArgs<Key> args{};
    args.look = nonfinite == NonFinite::error && fresh && !outputs.any_of(inputs.scope);
    if (nonfinite == NonFinite::error && !args.look) check();
    args.stride = num_blocks;
    args.num_outputs = int(num_outputs);
    args.num_tasks = int(inputs.scope.num_tasks);
    args.divisor = C(divisor);
    args.subtract = task_vectors;
    args.fused = fused;
    args.drop = nonfinite == NonFinite::drop;
    const Mix<Key> mix{places, numbers_of<C>(coefficients),
                       base_coefficients ? numbers_of<C>(*base_coefficients) : std::vector<C>(), size_t(num_outputs),
                       args};
    if (mix.run(inputs.scope, outputs)) check();
  };
  inputs.wide ? mix(int64_t()) : mix(int32_t());
  outputs.deliver();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("mix_out", TORCH_BOX(&mix_out)); }

}  // namespace sk
