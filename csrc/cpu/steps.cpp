#include <torch/csrc/stable/library.h>

#include "block_sums.h"
#include "inputs.h"
#include "steps_program.h"

namespace sk {
namespace {

constexpr int64_t kRun = 4096;  // elements of a column that are added one after the other

// What one thread does at a time: vectors one after the other, or a piece of one; of columns, a piece of those side by
// side.
struct Units {
  int64_t first, first_sum;       // units and partial sums of all tensors before
  int64_t pieces, width, strips;  // pieces of a vector; vectors of a unit, and how often

  Units(const Vectors& vectors, int64_t first, int64_t first_sum, int64_t block) : first(first), first_sum(first_sum) {
    const int64_t most = vectors.by_column ? kRun : kSumBlock, size = std::max<int64_t>(1, vectors.size);
    pieces = (size + most - 1) / most;
    width = std::min(vectors.count, vectors.by_column ? block : std::max<int64_t>(1, kSumBlock / size));
    strips = width ? (vectors.count + width - 1) / width : 0;
  }
  int64_t count() const { return pieces * strips; }
};

// What a program fills for every tensor: outputs like its inputs, one of which they may be, and bits.
class Filled {
 public:
  Filled(const Program& program, const std::vector<Tensor>& out, const std::vector<Tensor>& inputs, size_t num_inputs)
      : bits_(of_kind(program, out, true)),
        tensors_(of_kind(program, out, false), {}, inputs, num_inputs, size_t(count(program, false)),
                 /*in_place=*/true) {
    const size_t num_outputs = program.packs.size();
    for (const bool packed : program.packs)
      kinds_.push_back({packed, size_t(std::count_if(kinds_.begin(), kinds_.end(),
                                                     [&](const Kind& before) { return before.packed == packed; }))});
    for (size_t i = 0; i < out.size(); ++i) {
      const int64_t bytes = (inputs[i / num_outputs * num_inputs].numel() + 7) / 8;
      require(!program.packs[i % num_outputs] || (out[i].is_cpu() && out[i].scalar_type() == ScalarType::Byte &&
                                                  has_shape(out[i], {bytes}) && out[i].is_contiguous()),
              "out must be contiguous uint8 [", bytes, "] on the CPU for bits, got another tensor");
    }
    check_apart(bits_, {&inputs});
    check_apart(out, {});
  }

  void* at(const Scope& scope, size_t part, int64_t i, size_t output) const {
    const Kind& kind = kinds_[output];
    if (!kind.packed) return tensors_.at(scope, part, i, kind.place);
    return static_cast<char*>(bits_[part * (bits_.size() / scope.parts.size()) + kind.place].data_ptr()) + i / 8;
  }
  void deliver() { tensors_.deliver(); }

 private:
  struct Kind {
    bool packed;
    size_t place;  // among those of its kind
  };

  static int64_t count(const Program& program, bool packed) {
    return std::count(program.packs.begin(), program.packs.end(), packed);
  }
  static std::vector<Tensor> of_kind(const Program& program, const std::vector<Tensor>& out, bool packed) {
    std::vector<Tensor> chosen;
    for (size_t i = 0; i < out.size(); ++i)
      if (program.packs[i % program.packs.size()] == packed) chosen.push_back(out[i]);
    return chosen;
  }

  std::vector<Kind> kinds_;
  const std::vector<Tensor> bits_;
  Outputs tensors_;
};

class Run {
 public:
  Run(const StepsInputs& inputs, const Program& program, const Numbers& numbers, const Filled& outputs, bool in_place)
      : inputs_(inputs), program_(program), numbers_(numbers), outputs_(outputs), in_place_(in_place) {
    for (size_t p = 0; p < inputs.vectors.size(); ++p) {
      const Vectors& vectors = inputs.vectors[p];
      units_.emplace_back(vectors, num_units_, num_partial_, block());
      num_units_ += units_.back().count();
      num_partial_ += vectors.count * units_.back().pieces * program.num_sums;
    }
  }

  // sums: [num_blocks, num_sums]
  void run(double* sums) const {
    std::vector<double> partial(static_cast<size_t>(num_partial_));
    const int64_t grain = std::max<int64_t>(1, (1 << 16) / (kSumBlock * inputs_.scope.num_tasks));
    torch::stable::parallel_for(0, num_units_, grain, [&](int64_t first, int64_t last) {
      StepsThread thread(program_, inputs_.scope.num_tasks, inputs_.wide);
      for (int64_t unit = first; unit < last; ++unit) {
        const auto after = std::upper_bound(units_.begin(), units_.end(), unit,
                                            [](int64_t u, const Units& units) { return u < units.first; });
        const size_t p = size_t(after - 1 - units_.begin());
        const int64_t piece = (unit - units_[p].first) % units_[p].pieces;
        const int64_t strip = (unit - units_[p].first) / units_[p].pieces;
        inputs_.vectors[p].by_column ? run_columns(thread, p, strip, piece, partial.data())
                                     : run_vectors(thread, p, strip, piece, partial.data());
      }
    });
    for (size_t p = 0; p < units_.size(); ++p)
      for (int64_t i = 0; i < inputs_.vectors[p].count * program_.num_sums; ++i)
        *sums++ = fold_halves(&partial[size_t(units_[p].first_sum + i * units_[p].pieces)], units_[p].pieces);
  }

 private:
  int64_t block() const { return program_.block(inputs_.wide); }

  // Elements begin to begin + n of a tensor.
  void run(StepsThread& thread, size_t p, int64_t begin, int64_t n) const {
    const Part& part = inputs_.scope.parts[p];
    for (size_t j = 0; j < thread.outputs.size(); ++j) thread.outputs[j] = outputs_.at(inputs_.scope, p, begin, j);
    thread.args.stream = !in_place_ && part.numel * program_.num_outputs * size_of(part.dtype) > kStreamBytes;
    thread.run(part, begin, n);
  }
  void report(size_t p, int64_t count) const { inputs_.scope.report({inputs_.scope.parts[p], p, 0, 0, count}); }

  double* partial_at(double* partial, size_t p, int64_t vector, int64_t sum, int64_t piece) const {
    return partial + units_[p].first_sum + (vector * program_.num_sums + sum) * units_[p].pieces + piece;
  }

  void run_vectors(StepsThread& thread, size_t p, int64_t strip, int64_t piece, double* partial) const {
    const Vectors& vectors = inputs_.vectors[p];
    const Units& units = units_[p];
    const int64_t begin = piece * kSumBlock, n = std::min(kSumBlock, vectors.size - begin);
    const int64_t last = std::min(vectors.count, (strip + 1) * units.width);
    thread.args.by_column = false;
    thread.args.stride = 1;
    thread.args.lanes = kSumLanes;
    for (int64_t v = strip * units.width; v < last; ++v) {
      thread.args.numbers = numbers_.of(vectors.first + v);
      thread.clear_sums();
      run(thread, p, v * vectors.size + begin, n);
      for (int s = 0; s < program_.num_sums; ++s)
        *partial_at(partial, p, v, s, piece) = fold_halves(thread.args.sums + s * kSumLanes, kSumLanes);
    }
    report(p, (last - strip * units.width) * n);
  }

  void run_columns(StepsThread& thread, size_t p, int64_t strip, int64_t piece, double* partial) const {
    const Vectors& vectors = inputs_.vectors[p];
    const Units& units = units_[p];
    const int64_t first = strip * units.width, width = std::min(units.width, vectors.count - first);
    const int64_t last = std::min(vectors.size, (piece + 1) * kRun);
    const int64_t together = width == vectors.count ? block() / width : 1;  // rows, where they are neighbours
    thread.args.by_column = !numbers_.are_shared();
    thread.args.numbers = thread.args.by_column ? numbers_.from(vectors.first + first) : numbers_.of(0);
    thread.args.stride = thread.args.by_column ? numbers_.stride() : 1;
    thread.args.lanes = width;
    thread.clear_sums();
    for (int64_t row = piece * kRun; row < last; row += together)
      run(thread, p, row * vectors.count + first, std::min(together, last - row) * width);
    for (int s = 0; s < program_.num_sums; ++s)
      for (int64_t c = 0; c < width; ++c)
        *partial_at(partial, p, first + c, s, piece) = thread.args.sums[s * width + c];
    report(p, (last - piece * kRun) * width);
  }

  const StepsInputs& inputs_;
  const Program& program_;
  const Numbers& numbers_;
  const Filled& outputs_;
  const bool in_place_;
  std::vector<Units> units_;
  int64_t num_units_ = 0, num_partial_ = 0;
};

Tensor steps_out(std::vector<Tensor> inputs, int64_t num_inputs, std::vector<int64_t> words, Tensor numbers_tensor,
                 std::string axis_name, bool wide, std::vector<Tensor> out) {
  const Axis axis = parse_axis(axis_name);
  StepsInputs taken(inputs, num_inputs, axis, wide);
  Numbers numbers(numbers_tensor);
  const Program program(words, num_inputs, numbers.count());
  numbers.check(taken.num_blocks);
  const Tensor sums = torch::stable::new_empty(numbers_tensor, {taken.num_blocks, int64_t(program.num_sums)});
  if (numbers.are_shared() && program.num_sums == 0) taken.join();
  if (axis == Axis::column && !numbers.are_shared()) numbers.transpose();

  const size_t outputs = size_t(program.num_outputs), parts = taken.scope.parts.size();
  require(out.size() == parts * outputs, "out must be ", outputs, " for every tensor that is computed, got ",
          out.size(), " for ", parts);
  require(!program.packs_any() || axis == Axis::tensor, "axis must be 'tensor' for a program with bits, got '",
          axis_name, "'");
  bool in_place = false;
  for (size_t i = 0; i < out.size(); ++i) {
    if (program.packs[i % outputs]) continue;
    const auto* const of_part = &inputs[i / outputs * size_t(num_inputs)];
    check_same_shape(out[i], of_part[0], "out", "inputs[0]");
    for (int64_t j = 0; j < num_inputs; ++j) in_place |= out[i].numel() > 0 && same_memory(out[i], of_part[j]);
  }
  require(!in_place || !program.loads_after_stores,
          "program must load before it stores where out is an input, got a load after a store");
  Filled to(program, out, inputs, size_t(num_inputs));

  Run(taken, program, numbers, to, in_place).run(static_cast<double*>(sums.data_ptr()));
  to.deliver();
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(surgery_kernels, CPU, m) { m.impl("steps_out", TORCH_BOX(&steps_out)); }

}  // namespace sk
