// Where the rows of surgery_adapter's tensors lie, and who corrects which of them together.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "../check.h"
#include "buffer.h"
#include "surgery_adapter_kernel.h"

namespace sk {

// features [num_tasks, samples, (tokens,) dim], or indexed [samples, (tokens,) dim]: each sample names its task.
struct FeaturesShape {
  bool indexed;
  int64_t groups, samples, tokens, dim;  // groups: num_tasks, or 1

  FeaturesShape(const Tensor& features, bool indexed) : indexed(indexed) {
    const int64_t first = indexed ? 0 : 1, last = features.dim() - 1;
    require(last == first + 1 || last == first + 2, "features must have ", first + 2, " or ", first + 3,
            " dimensions, got ", last + 1);
    groups = indexed ? 1 : features.size(0);
    samples = features.size(first);
    tokens = last == first + 2 ? features.size(first + 1) : 1;
    dim = features.size(last);
  }
  int64_t all_samples() const { return groups * samples; }
  int64_t rows() const { return all_samples() * tokens; }
};

// Consecutive rows of one task in the order of a plan; row: the first one's place in that order.
struct RowBlock {
  int64_t task, row, count;
  std::array<int64_t, kBlockRows> sample, token;
};

// The rows of a tensor laid out like features, in any strides, or without tokens: one row then serves all of a sample.
class Rows {
 public:
  using Pointers = std::array<void*, kBlockRows>;

  Rows() = default;  // of no tensor
  Rows(const Tensor& t, const FeaturesShape& shape) : given_(true), at_(static_cast<char*>(t.data_ptr())) {
    const int64_t first = shape.indexed ? 0 : 1, last = t.dim() - 1, bytes = int64_t(t.element_size());
    samples_ = shape.samples;
    group_ = shape.indexed ? 0 : t.stride(0) * bytes;
    sample_ = t.stride(first) * bytes;
    token_ = last == first + 2 ? t.stride(first + 1) * bytes : 0;
  }

  explicit operator bool() const { return given_; }
  void* of(int64_t sample, int64_t token) const {
    return at_ + sample / samples_ * group_ + sample % samples_ * sample_ + token * token_;
  }
  // As kernels take them: null for no tensor, else the pointers, kept in `memory`.
  void* const* of(const RowBlock& block, Pointers& memory) const {
    if (!given_) return nullptr;
    for (int64_t i = 0; i < block.count; ++i) memory[i] = of(block.sample[i], block.token[i]);
    return memory.data();
  }

 private:
  bool given_ = false;
  char* at_ = nullptr;
  int64_t samples_ = 0, group_ = 0, sample_ = 0, token_ = 0;  // strides in bytes
};

// The samples task by task, cut into units by shape alone: sums over a unit, and then over the units of a task, do not
// depend on the number of threads.
class Plan {
 public:
  struct Unit {
    int64_t task, first, last;  // order[first, last)
  };
  std::vector<int64_t> order;  // samples
  std::vector<Unit> units;     // in order of the tasks

  Plan(const FeaturesShape& shape, int64_t num_tasks, int64_t rank, const std::optional<Tensor>& task_index)
      : order(size_t(shape.all_samples())), tokens_(shape.tokens) {
    constexpr int64_t kUnits = 16, kWorkPerThread = 1 << 19;  // multiply-adds
    const std::vector<int64_t> ends = task_index ? sort(*task_index, num_tasks) : keep_order(shape, num_tasks);
    const int64_t wanted = (kUnits + num_tasks - 1) / std::max<int64_t>(num_tasks, 1);
    for (int64_t t = 0, first = 0; t < num_tasks; first = ends[t++]) {
      const int64_t samples = ends[t] - first, blocks = (samples * tokens_ + kBlockRows - 1) / kBlockRows;
      // Without tokens too there is a unit: somebody writes the means.
      const int64_t parts = std::min({wanted, samples, std::max<int64_t>(blocks, 1)});
      for (int64_t p = 0; p < parts; ++p)
        units.push_back({t, first + samples * p / parts, first + samples * (p + 1) / parts});
    }
    const int64_t work = shape.rows() * shape.dim / std::max<int64_t>(int64_t(units.size()), 1) * rank;
    grain_ = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(work, 1));
  }

  // The first unit of a task and the one after its last.
  std::pair<int64_t, int64_t> units_of(int64_t task) const {
    const auto before = [](const Unit& unit, int64_t t) { return unit.task < t; };
    const auto first = std::lower_bound(units.begin(), units.end(), task, before);
    const auto last = std::lower_bound(first, units.end(), task + 1, before);
    return {first - units.begin(), last - units.begin()};
  }

  // Runs body(unit, scratch) over the indices of all units, with so many elements of scratch memory for each thread.
  template <class C, class Body>
  void parallel(int64_t scratch_size, const Body& body) const {
    torch::stable::parallel_for(0, int64_t(units.size()), grain_, [&](int64_t first, int64_t last) {
      const Buffer<C> scratch(scratch_size);
      for (int64_t u = first; u < last; ++u) body(u, scratch.get());
    });
  }

  // Runs body(block) over the rows of a unit.
  template <class Body>
  void each_block(const Unit& unit, const Body& body) const {
    RowBlock block;
    block.task = unit.task;
    const int64_t end = unit.last * tokens_;
    for (block.row = unit.first * tokens_; block.row < end; block.row += kBlockRows) {
      block.count = std::min(kBlockRows, end - block.row);
      for (int64_t i = 0; i < block.count; ++i) {
        block.sample[i] = order[(block.row + i) / tokens_];
        block.token[i] = (block.row + i) % tokens_;
      }
      body(block);
    }
  }

 private:
  int64_t tokens_, grain_;

  // Both return the end of each task's samples in `order`.
  std::vector<int64_t> keep_order(const FeaturesShape& shape, int64_t num_tasks) {
    std::iota(order.begin(), order.end(), 0);
    std::vector<int64_t> ends(num_tasks);
    for (int64_t t = 0; t < num_tasks; ++t) ends[t] = (t + 1) * shape.samples;
    return ends;
  }
  std::vector<int64_t> sort(const Tensor& task_index, int64_t num_tasks) {  // by counting; stable
    const int64_t* const task = static_cast<const int64_t*>(task_index.data_ptr());
    std::vector<int64_t> ends(num_tasks);
    for (size_t i = 0; i < order.size(); ++i) {
      require(0 <= task[i] && task[i] < num_tasks, "task_index must be in [0, ", num_tasks, "), got ", task[i]);
      ++ends[task[i]];
    }
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    std::vector<int64_t> next(ends);
    for (size_t i = order.size(); i-- > 0;) order[--next[task[i]]] = int64_t(i);
    return ends;
  }
};

}  // namespace sk
