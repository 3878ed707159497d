// Representation surgery of one task on cached features: every step gathers its images, corrects them, takes the L1
// loss and its gradients, and moves the adapter by Adam. Adapter, moments and batch stay in the second-level cache.
// Bound: 10 rank dim FLOPs an image, and 16 dim rank elements a step that Adam reads or writes.
#pragma once
#include "surgery_adapter_kernel.h"

namespace sk {

// A parameter and its moments, alike in shape.
template <class C>
struct Moving {
  C *value, *first, *second;
};

// moment = keep * moment + take * x; take = 1 - keep, rounded once
template <class C>
struct Decay {
  C keep, take;
};

// One step with its bias corrections: value -= rate * first / (sqrt(second) * scale + eps)
template <class C>
struct AdamStep {
  C rate, scale;
};

template <class C>
struct Adam {
  Decay<C> first, second;
  C eps;
  int64_t zero_grad_steps;
  const AdamStep<C>* steps;  // 1 + zero_grad_steps for each training step: the later ones with a gradient of zero
};

template <class Key>
struct SurgeryTraining {
  using C = ComputeOf<Key>;

  int64_t dim, rank, steps, batch;
  const void *features, *targets;  // [images, dim]
  const int64_t* indices;          // [steps] every `index_stride`, each [batch]
  int64_t index_stride;
  Moving<C> down, up;  // [rank, dim], [dim, rank]
  Adam<C> adam;
  C* losses;  // [steps] every `loss_stride`
  int64_t loss_stride;
  C* scratch;  // train_scratch(dim, rank) elements
};
template <class Key>
using SurgeryTrainKernel = void (*)(const SurgeryTraining<Key>& args);

inline int64_t train_scratch(int64_t dim, int64_t rank) {
  return block_scratch(dim, rank) + 2 * dim * padded(rank) + 8 * rank * padded(dim);
}

using SurgeryTrainKernels = PerDtype<SurgeryTrainKernel>;

SK_DECLARE_KERNELS(SurgeryTrainKernels, surgery_train_kernels);

}  // namespace sk
