#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "../trim_options.h"
#include "buffer.h"
#include "finite.h"
#include "gram_kernel.h"
#include "inputs.h"

namespace sk {
namespace {

enum class Axis { tensor, row, column, model };

constexpr int64_t kRun = 4096;               // elements of a column that are added one after the other
constexpr int64_t kColumns = 4 * kSumLanes;  // read together: a few bytes of a row are not worth its page
constexpr int64_t kHeld = 1 << 21;           // sums of a tensor that wait for others, 16 MiB

// The order of fold_halves without the whole list in memory.
struct Fold {
  std::vector<int64_t> lengths;  // of the list, after each round

  explicit Fold(int64_t length) : lengths{length} {
    while (lengths.back() > 1) lengths.push_back((lengths.back() + 1) / 2);
  }
  size_t rounds() const { return lengths.size() - 1; }

  // What place j holds after some rounds, `width` numbers; leaf(j, sums) puts there what it held before the first.
  // sums: [rounds + 1, width], of which the first row is the result.
  template <class Leaf>
  void place(int64_t j, size_t after, int64_t width, double* sums, const Leaf& leaf) const {
    if (after == 0) return leaf(j, sums);
    place(j, after - 1, width, sums, leaf);
    const int64_t other = j + lengths[after];
    if (other >= lengths[after - 1]) return;
    place(other, after - 1, width, sums + width, leaf);
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[width + i];
  }
};

// The vectors of one tensor: each flat, or columns side by side; a tensor of one dimension is one vector.
struct Vectors {
  bool by_column;
  int64_t count, size;  // how many, and elements of each

  Vectors(const Tensor& t, Axis axis) : by_column(axis == Axis::column && t.dim() > 1), count(1), size(t.numel()) {
    if (t.dim() < 2 || (axis != Axis::row && axis != Axis::column)) return;
    size = t.size(by_column ? 0 : t.dim() - 1);
    for (int64_t d = by_column; d < t.dim() - !by_column; ++d) count *= t.size(d);
  }

  // A unit is a flat vector or columns side by side; a piece is what one call of a kernel reads of it.
  int64_t lanes() const { return by_column ? kColumns : 1; }
  int64_t units() const { return (count + lanes() - 1) / lanes(); }
  int64_t pieces() const {
    const int64_t most = by_column ? kRun : kSumBlock;
    return std::max<int64_t>(1, (size + most - 1) / most);
  }
};

template <class Key>
class Gram {
 public:
  Gram(const Scope& scope, bool rounded, bool drop) : scope_(scope), rounded_(rounded), drop_(drop) {}

  // out: [vectors.count, num_tasks, num_tasks]
  void run(size_t part, const Vectors& vectors, double* out) const {
    const int64_t pairs = num_pairs(scope_.num_tasks), width = pairs * vectors.lanes(), units = vectors.units();
    const Fold fold(vectors.pieces());
    // Threads share places of the list, as many as may wait for one another; what is folded into one is one thread's.
    size_t after = 0;
    while (fold.lengths[after] > 1 && fold.lengths[after] * units * width > kHeld) ++after;
    const int64_t places = fold.lengths[after];
    const Buffer<double> held(places > 1 ? places * units * width : 0);
    const int64_t elements = vectors.lanes() * vectors.size / places * scope_.num_tasks;
    torch::stable::parallel_for(0, places * units, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, elements)),
                                [&](int64_t first, int64_t last) {
                                  const Buffer<double> inputs(scope_.num_tasks * kGramSteps * kSumLanes),
                                      lanes(pairs * kSumLanes);
                                  const Buffer<double> sums(int64_t(after + 1) * width);
                                  for (int64_t k = first; k < last; ++k) {
                                    const int64_t unit = k / places;
                                    fold.place(k % places, after, width, sums.get(), [&](int64_t piece, double* to) {
                                      add_up(part, vectors, unit, piece, inputs.get(), lanes.get(), to);
                                    });
                                    if (places > 1)
                                      std::copy_n(sums.get(), width, held.get() + k * width);
                                    else
                                      deliver(vectors, unit, sums.get(), out);
                                  }
                                });
    if (places == 1) return;
    const Fold rest(places);
    const Buffer<double> sums(int64_t(rest.rounds() + 1) * width);
    for (int64_t unit = 0; unit < units; ++unit) {
      rest.place(0, rest.rounds(), width, sums.get(),
                 [&](int64_t j, double* to) { std::copy_n(held.get() + (unit * places + j) * width, width, to); });
      deliver(vectors, unit, sums.get(), out);
    }
  }

 private:
  // One piece of a unit: to [num_pairs], or [strips, num_pairs, kSumLanes].
  void add_up(size_t p, const Vectors& vectors, int64_t unit, int64_t piece, double* inputs, double* lanes,
              double* to) const {
    const Part& part = scope_.parts[p];
    const GramKernels& kernels = SK_KERNELS(gram_kernels);
    const int num_tasks = int(scope_.num_tasks);
    GramArgs<Key> args{};
    int64_t begin, count;
    if (vectors.by_column) {
      begin = piece * kRun * vectors.count + unit * kColumns;
      args.steps = std::min(kRun, vectors.size - piece * kRun);
      args.stride = vectors.count;
      args.width = args.last = int(std::min(kColumns, vectors.count - unit * kColumns));
      count = args.steps * args.width;
    } else {
      begin = unit * vectors.size + piece * kSumBlock;
      count = std::min(kSumBlock, vectors.size - piece * kSumBlock);
      args.steps = (count + kSumLanes - 1) / kSumLanes;
      args.stride = args.width = kSumLanes;
      args.last = int(count - (args.steps - 1) * kSumLanes);
    }
    std::vector<const void*> experts(part.experts.size());
    for (size_t t = 0; t < experts.size(); ++t) experts[t] = part.expert_at(int64_t(t), begin);
    args.base = part.base_at(begin);
    args.experts = experts.data();
    args.num_tasks = num_tasks;
    args.rounded = rounded_;
    args.drop = drop_;
    kernels.add.template get<Key>(part.dtype)(args, inputs, vectors.by_column ? to : lanes);
    if (!vectors.by_column) kernels.fold(lanes, num_pairs(num_tasks), to);
    scope_.report({part, p, 0, begin, count});
  }

  void deliver(const Vectors& vectors, int64_t unit, const double* sums, double* out) const {
    const int64_t n = scope_.num_tasks, first = unit * vectors.lanes();
    const int64_t side_by_side = vectors.by_column ? kSumLanes : 1;
    for (int64_t l = 0; l < std::min(vectors.lanes(), vectors.count - first); ++l) {
      const double* const of_strip = sums + l / side_by_side * num_pairs(n) * side_by_side;
      double* const matrix = out + (first + l) * n * n;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i; j < n; ++j)
          matrix[i * n + j] = matrix[j * n + i] = of_strip[pair_of(i, j, n) * side_by_side + l % side_by_side];
    }
  }

  const Scope& scope_;
  bool rounded_, drop_;
};

// A vector that is not finite has no finite square.
bool squares_are_finite(const double* matrices, int64_t count, int64_t num_tasks) {
  for (int64_t v = 0; v < count; ++v)
    for (int64_t t = 0; t < num_tasks; ++t)
      if (!std::isfinite(matrices[(v * num_tasks + t) * num_tasks + t])) return false;
  return true;
}

Tensor gram(std::vector<Tensor> base, std::vector<Tensor> experts, int64_t num_tasks, std::string axis_name,
            bool rounded, std::string nonfinite_name, std::optional<std::vector<std::string>> names) {
  const Axis axis = Axis(one_of("axis", axis_name, {"tensor", "row", "column", "model"}));
  const NonFinite nonfinite = parse_nonfinite(nonfinite_name);
  require(num_tasks > 0, "num_tasks must be 1 or more, got ", num_tasks);
  const Inputs inputs(base, experts, size_t(num_tasks));
  const Scope& scope = inputs.scope;
  const int64_t matrix = num_tasks * num_tasks;
  std::vector<Vectors> vectors;
  int64_t count = 0;
  for (size_t i = 0; i < experts.size(); i += size_t(num_tasks)) {
    vectors.emplace_back(experts[i], axis);
    count += vectors.back().count;
  }
  const Tensor products = torch::stable::new_empty(experts[0], {count, num_tasks, num_tasks}, ScalarType::Double);
  double* const first = static_cast<double*>(products.data_ptr());
  const auto fill = [&](auto key) {
    using Key = decltype(key);
    const Gram<Key> gram(scope, rounded, nonfinite == NonFinite::drop);
    double* out = first;
    for (size_t p = 0; p < scope.parts.size(); ++p) {
      gram.run(p, vectors[p], out);
      if (nonfinite == NonFinite::error && !squares_are_finite(out, vectors[p].count, num_tasks)) {
        const Part& part = scope.parts[p];
        Scope alone;
        alone.num_tasks = num_tasks;
        alone.add(part.dtype, part.numel, part.base, part.experts);
        check_finite<Key>(alone, names && p < names->size() ? std::vector{(*names)[p]} : std::vector<std::string>());
      }
      out += vectors[p].count * matrix;
    }
  };
  inputs.wide ? fill(int64_t()) : fill(int32_t());
  if (axis != Axis::model) return products;
  const Fold fold(count);
  const Buffer<double> sums(int64_t(fold.rounds() + 1) * matrix);
  fold.place(0, fold.rounds(), matrix, sums.get(),
             [&](int64_t part, double* to) { std::copy_n(first + part * matrix, matrix, to); });
  const Tensor of_model = torch::stable::new_empty(products, {1, num_tasks, num_tasks});
  std::copy_n(sums.get(), matrix, static_cast<double*>(of_model.data_ptr()));
  return of_model;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace sk
