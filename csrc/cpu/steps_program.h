// A program of steps_out or steps_limits, parsed and checked: what it runs over cannot corrupt memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../check.h"
#include "../step.h"
#include "buffer.h"
#include "scope.h"
#include "steps_kernel.h"

namespace sk {

struct Program {
  std::vector<Step> steps;
  int num_registers = 0, num_outputs = 0, num_sums = 0;
  std::vector<bool> packs;          // [num_outputs]: whether an output is bits
  bool loads_after_stores = false;  // the memory of an output cannot be that of an input

  bool packs_any() const { return std::find(packs.begin(), packs.end(), true) != packs.end(); }

  Program(const std::vector<int64_t>& words, int64_t num_inputs, int64_t num_numbers);

  // Elements of a register, so that all of them stay in the first-level cache.
  int block(bool wide) const;
};

constexpr int kMostBlock = 512;

enum class Axis { tensor, row, column };

// The vectors of one tensor that take their own numbers and give their own sums: itself, or its rows along the last
// dimension, or the columns of [size(0), numel / size(0)]. A tensor of one dimension or none is one vector.
struct Vectors {
  bool by_column;
  int64_t first;        // vectors of all tensors before
  int64_t count, size;  // how many, and elements of each

  Vectors(const Tensor& t, Axis axis, int64_t first);
};

// float64 [num_blocks or 1, num_numbers] as kernels read it.
class Numbers {
 public:
  explicit Numbers(const Tensor& numbers);
  void check(int64_t num_blocks) const;

  int64_t count() const { return count_; }
  bool are_shared() const { return blocks_ == 1; }
  // Of one block: number k at k.
  const double* of(int64_t block) const { return rows_.data() + (are_shared() ? 0 : block * count_); }
  // Of blocks side by side: number k at k * stride().
  void transpose();
  const double* from(int64_t block) const { return columns_.data() + block; }
  int64_t stride() const { return blocks_; }

 private:
  int64_t blocks_, count_;
  std::vector<double> rows_, columns_;
};

// All inputs of the first tensor, then of the second, ..., checked, contiguous and alive.
struct StepsInputs {
  std::vector<Tensor> alive;
  Scope scope;  // an input is an expert there
  std::vector<Vectors> vectors;
  int64_t num_blocks = 0;
  bool wide;  // registers are double: for float64, or where asked for

  StepsInputs(const std::vector<Tensor>& inputs, int64_t num_inputs, Axis axis, bool wide);
  void join();  // one vector of each tensor
};

// What a thread runs a program with. Numbers, lanes and outputs are set by who runs it.
class StepsThread {
 public:
  StepsArgs args{};
  std::vector<void*> outputs;
  int64_t offset = 0;  // elements of the tensor before those that a part points to

  StepsThread(const Program& program, int64_t num_inputs, bool wide);
  void clear_sums();
  // Elements begin to begin + n of a tensor; outputs point to the first of them.
  void run(const Part& part, int64_t begin, int64_t n);

 private:
  const Program& program_;
  const bool wide_;
  std::vector<const void*> inputs_;
  Buffer<char> registers_;
  std::vector<double> sums_;
};

inline Axis parse_axis(const std::string& name) { return Axis(one_of("axis", name, {"tensor", "row", "column"})); }

}  // namespace sk
