// A short program of element-wise steps over raw pointers. Registers hold blocks of elements that stay in the
// first-level cache, each step is one loop over a block, and what is read from memory is read once.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "../step.h"
#include "isa.h"

namespace sk {

constexpr int kStepGroup = 32;  // elements that a step takes at a time: a register holds whole groups

struct StepsArgs {
  const Step* steps;
  int num_steps;
  const void* const* inputs;  // [num_inputs]
  void* const* outputs;       // [num_outputs]; of bits, the byte of the first element
  int64_t n, index;           // elements, and the place of the first one in its tensor; by column at most `block`
  const double* numbers;      // number k at k * stride; by column that of element i at k * stride + i % lanes
  int64_t stride;
  bool by_column;
  double* sums;  // sum s takes element i at s * lanes + i % lanes; lanes is kSumLanes unless sums are by column
  int64_t lanes;
  void* registers;  // [num_registers, register_stride], aligned to 64 bytes
  int block;        // elements of a register, a multiple of kStepGroup
  bool keys;        // outputs are in the compute type
  bool stream;      // write past the caches
};

// Elements from one register to the next: at the same place of a page a load would wait for a store to another.
template <class C>
constexpr int register_stride(int block) {
  return block + 64 / int(sizeof(C));
}

using StepsKernel = void (*)(const StepsArgs& args);

// By the stored dtype; registers hold float, or double for double and for all of the wide ones.
struct StepsKernels {
  StepsKernel f32, f16, bf16, f64, wide_f32, wide_f16, wide_bf16;

  StepsKernel get(Dtype dtype, bool wide) const {
    if (dtype == Dtype::f64) return f64;
    if (dtype == Dtype::f32) return wide ? wide_f32 : f32;
    if (dtype == Dtype::f16) return wide ? wide_f16 : f16;
    return wide ? wide_bf16 : bf16;
  }
};

SK_DECLARE_KERNELS(StepsKernels, steps_kernels);

}  // namespace sk
