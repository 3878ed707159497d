// Representation surgery of one task on cached features: every step gathers its images, corrects them, takes the L1
// loss and its gradients, and moves the adapter by Adam. Adapter, moments and batch stay in the second-level cache.
#pragma once
#include "surgery_adapter_kernel.h"

namespace sk {

// One step of Adam with its bias corrections: value -= rate * first / (sqrt(second) * scale + eps)
template <class C>
struct AdamStep {
  C rate, scale;
};

// A parameter and its moments, alike in shape.
template <class C>
struct Moving {
  C *value, *first, *second;
};

template <class Key>
struct SurgeryTraining {
  using C = ComputeOf<Key>;

  int64_t dim, rank, steps, batch;
  const void *features, *targets;  // [images, dim]
  const int64_t* indices;          // [steps] every `index_stride`, each [batch]
  int64_t index_stride;
  Moving<C> down, up;       // [rank, dim], [dim, rank]
  const AdamStep<C>* adam;  // [steps, 1 + zero_grad_steps]: the later ones with a gradient of zero
  int64_t zero_grad_steps;
  C beta1, beta2, eps;
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
