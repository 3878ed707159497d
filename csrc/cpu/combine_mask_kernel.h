// A merge under a mask of relaxed Bernoulli variables, over raw pointers and one piece of a block of parameters.
// A mask is computed where it is needed, from logits and the words of philox.h: forward reads the logits, then the mask
// where the result will be, base and task vectors; backward reads gradient, logits and task vectors once.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "../philox.h"
#include "isa.h"

namespace sk {

// mask = 1 / (1 + exp(-(logit + log(u / (1 - u))) * sharpness)), u = (word + 1/2) / 2^32, or 1/2 where none is drawn;
// in double, rounded to the compute type. At sharpness s = 1 and 2 in the compute type, as u^s / (u^s + ((1 - u)
// exp(-logit))^s), of float with the upper 23 bits of the word. Element i of a block takes the word of element i of the
// stream.
struct MaskNoise {
  RandomStream stream;
  bool drawn;
  double sharpness;  // 1 / temperature
};

constexpr int kMaskLanes = 1024;

// Writes n <= kSumBlock elements of the mask and returns their sum: element i adds to sum i % kMaskLanes, and those are
// folded in halves. first: a multiple of 4.
template <class C>
using DrawMask = double (*)(const C* logits, const MaskNoise& noise, int64_t first, int64_t n, C* mask);

template <class Key>
struct MaskedArgs {
  using C = ComputeOf<Key>;

  const void* base;                 // backward: the gradient of the result
  const void* const* task_vectors;  // [num_tasks]
  const C* coefficients;            // [num_tasks]
  int num_tasks;
  const C* mask;  // [n]
  C mean;         // of the mask of the block
  int64_t n;
};

// out = base + mask / mean * S, S = sum_t coefficients[t] * task_vectors[t]. The mask may be where out is.
template <class Key>
using MaskedKernel = void (*)(const MaskedArgs<Key>& args, void* out);

// pull[i] = gradient[i] * S[i]. sums: that of pull * mask, and for every task vector that of its products with
// gradient * mask / mean.  # [1 + num_tasks]
template <class Key>
using MaskedGradients = void (*)(const MaskedArgs<Key>& args, ComputeOf<Key>* pull, double* sums);

// In place: the gradient of the logits, (pull - shift) / mean * mask * (1 - mask) * sharpness.
template <class C>
using LogitsGradient = void (*)(const C* mask, C shift, C mean, C sharpness, int64_t n, C* pull);

struct CombineMaskKernels {
  DrawMask<float> draw_f32;
  DrawMask<double> draw_f64;
  PerDtype<MaskedKernel> forward;
  PerDtype<MaskedGradients> backward;
  LogitsGradient<float> logits_f32;
  LogitsGradient<double> logits_f64;

  template <class C>
  DrawMask<C> draw() const {
    if constexpr (sizeof(C) == 8)
      return draw_f64;
    else
      return draw_f32;
  }
  template <class C>
  LogitsGradient<C> logits() const {
    if constexpr (sizeof(C) == 8)
      return logits_f64;
    else
      return logits_f32;
  }
};

SK_DECLARE_KERNELS(CombineMaskKernels, combine_mask_kernels);

}  // namespace sk
