#include "steps_program.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "block_sums.h"

namespace sk {
namespace {

constexpr int64_t kMost = 1 << 10;        // registers, outputs or sums
constexpr int64_t kRegisters = 24 << 10;  // bytes that all of them take together, where there are not too many

// The smallest number above all that were used; each below it was.
class Used {
 public:
  explicit Used(const char* what) : what_(what) {}
  void add(int64_t i) {
    require(i >= 0 && i < kMost, "program must have ", what_, " in [0, ", kMost, "), got ", i);
    if (i >= int64_t(used_.size())) used_.resize(size_t(i) + 1);
    used_[size_t(i)] = true;
  }
  bool has(int64_t i) const { return i >= 0 && i < int64_t(used_.size()) && used_[size_t(i)]; }
  int count() const { return int(used_.size()); }
  int dense_count() const {
    const auto gap = std::find(used_.begin(), used_.end(), false);
    require(gap == used_.end(), "program must use every one of its ", what_, ", got none for ", gap - used_.begin());
    return count();
  }

 private:
  const char* what_;
  std::vector<bool> used_;
};

}  // namespace

Program::Program(const std::vector<int64_t>& words, int64_t num_inputs, int64_t num_numbers) {
  require(!words.empty() && words.size() % 5 == 0, "program must be five integers for every step, got ", words.size());
  Used registers("registers"), outputs("outputs"), sums("sums");
  for (size_t i = 0; i < words.size(); i += 5) {
    const int64_t *const word = &words[i], destination = word[1], a = word[2], b = word[3];
    require(word[0] >= 0 && word[0] < kNumCodes, "program must have codes in [0, ", kNumCodes, "), got ", word[0]);
    const Code code = Code(word[0]);
    const auto reads = [&](int64_t r) {
      require(registers.has(r), "program must fill a register before it is read, got ", r, " in step ", i / 5);
    };
    const auto has_number = [&](int64_t k) {
      require(k >= 0 && k < num_numbers, "program must have numbers in [0, ", num_numbers, "), got ", k);
    };
    switch (code) {
      case Code::load:
        require(a >= 0 && a < num_inputs, "program must have inputs in [0, ", num_inputs, "), got ", a);
        loads_after_stores |= outputs.count() > 0;
        break;
      case Code::number:
        has_number(a);
        break;
      case Code::within:
        reads(a);
        has_number(b), has_number(b + 1);
        break;
      case Code::abs:
      case Code::neg:
      case Code::sqrt:
      case Code::exp:
      case Code::log:
      case Code::sum:
      case Code::store:
      case Code::bits:
        reads(a);
        break;
      case Code::fma:
      case Code::select:
        reads(destination);
        [[fallthrough]];
      default:
        reads(a), reads(b);
    }
    const bool fills = code == Code::store || code == Code::bits;
    (fills ? outputs : code == Code::sum || code == Code::dot ? sums : registers).add(destination);
    if (fills) {
      if (size_t(destination) >= packs.size()) packs.resize(size_t(destination) + 1);
      packs[size_t(destination)] = code == Code::bits;
    }
    const bool unary = code == Code::abs || code == Code::neg || code == Code::sqrt;
    steps.push_back({code, int32_t(destination), int32_t(a), int32_t(unary ? a : b), word[4] != 0});
  }
  num_registers = registers.count();
  num_outputs = outputs.dense_count();
  num_sums = sums.dense_count();
}

int Program::block(bool wide) const {
  const int64_t elements = kRegisters / (std::max(1, num_registers) * (wide ? 8 : 4));
  return int(std::clamp<int64_t>(elements, 128, kMostBlock)) / kStepGroup * kStepGroup;
}

Vectors::Vectors(const Tensor& t, Axis axis, int64_t first)
    : by_column(axis == Axis::column && t.dim() > 1), first(first), count(1), size(t.numel()) {
  if (axis == Axis::tensor || t.dim() < 2) return;
  size = t.size(by_column ? 0 : t.dim() - 1);
  for (int64_t d = by_column; d < t.dim() - !by_column; ++d) count *= t.size(d);
}

Numbers::Numbers(const Tensor& numbers) {
  require(numbers.is_cpu() && numbers.dim() == 2 && numbers.scalar_type() == ScalarType::Double,
          "numbers must be float64 [num_blocks, num_numbers] on the CPU, got another dtype, shape or device");
  blocks_ = numbers.size(0), count_ = numbers.size(1);
  const Tensor contiguous = torch::stable::contiguous(numbers);
  const double* const first = static_cast<const double*>(contiguous.data_ptr());
  rows_.assign(first, first + blocks_ * count_);
  // the payload of another NaN could carry into the sign when it is rounded to bfloat16
  for (double& number : rows_)
    if (std::isnan(number)) number = std::numeric_limits<double>::quiet_NaN();
}

void Numbers::check(int64_t num_blocks) const {
  require(blocks_ == 1 || blocks_ == num_blocks, "numbers must be of 1 block or of ", num_blocks, ", got ", blocks_);
}

void Numbers::transpose() {
  columns_.resize(rows_.size());
  for (int64_t block = 0; block < blocks_; ++block)
    for (int64_t k = 0; k < count_; ++k) columns_[size_t(k * blocks_ + block)] = rows_[size_t(block * count_ + k)];
}

StepsInputs::StepsInputs(const std::vector<Tensor>& inputs, int64_t num_inputs, Axis axis, bool wide) : wide(wide) {
  require(num_inputs > 0 && !inputs.empty() && int64_t(inputs.size()) % num_inputs == 0,
          "inputs must be num_inputs tensors for every tensor that is computed, got ", inputs.size(), " for ",
          num_inputs);
  scope.num_tasks = num_inputs;
  alive.reserve(inputs.size());
  for (size_t i = 0; i < inputs.size(); i += size_t(num_inputs)) {
    const Tensor& first = inputs[i];
    const Dtype dtype = dtype_of(first, "inputs");
    const bool is_double = dtype == Dtype::f64;
    require(i == 0 || is_double == (scope.parts[0].dtype == Dtype::f64),
            "inputs must be all float64 or none, got both");
    this->wide |= is_double;
    std::vector<const char*> pointers;
    for (size_t j = i; j < i + size_t(num_inputs); ++j) {
      check_same_shape(inputs[j], first, "inputs[" + std::to_string(j - i) + "]", "inputs[0]");
      alive.push_back(torch::stable::contiguous(inputs[j]));
      pointers.push_back(static_cast<const char*>(alive.back().data_ptr()));
    }
    scope.add(dtype, first.numel(), nullptr, std::move(pointers));
    vectors.emplace_back(first, axis, num_blocks);
    num_blocks += vectors.back().count;
  }
}

void StepsInputs::join() {
  for (size_t p = 0; p < vectors.size(); ++p) {
    Vectors& whole = vectors[p];
    whole.by_column = false, whole.first = int64_t(p), whole.count = 1, whole.size = scope.parts[p].numel;
  }
}

StepsThread::StepsThread(const Program& program, int64_t num_inputs, bool wide)
    : outputs(size_t(program.num_outputs)),
      program_(program),
      wide_(wide),
      inputs_(size_t(num_inputs)),
      registers_(int64_t(program.num_registers) * register_stride<double>(kMostBlock) * 8),
      sums_(size_t(program.num_sums) * kMostBlock) {
  args.steps = program.steps.data();
  args.num_steps = int(program.steps.size());
  args.inputs = inputs_.data();
  args.outputs = outputs.data();
  args.sums = sums_.data();
  args.lanes = kSumLanes;
  args.stride = 1;
  args.registers = registers_.get();
}

void StepsThread::clear_sums() { std::fill_n(sums_.begin(), args.lanes * program_.num_sums, 0.0); }

void StepsThread::run(const Part& part, int64_t begin, int64_t n) {
  for (size_t i = 0; i < inputs_.size(); ++i) inputs_[i] = part.expert_at(int64_t(i), begin);
  args.index = offset + begin;
  args.n = n;
  args.block = program_.block(wide_);
  SK_KERNELS(steps_kernels).get(part.dtype, wide_)(args);
}

}  // namespace sk
