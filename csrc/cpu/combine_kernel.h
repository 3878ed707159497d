// The gradient of coefficients over raw pointers: <grad, task_vector_t> of a block of parameters, for every expert.
// Reads each task vector once; of many, some at a time, while the block of grad stays in the caches.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

// Products and the sums of 128 of them in each of 32 lanes (float64: 16) are in the compute type, the rest in double.
// Which lane takes an element depends on its place in the run alone, so all instruction sets give the same bits.
template <class Key>
using DotKernel = void (*)(const void* grad, const void* const* task_vectors, int num_tasks, int64_t n,
                           double* out);  // out: [num_tasks]

using DotKernels = PerDtype<DotKernel>;

SK_DECLARE_KERNELS(DotKernels, dot_kernels);

}  // namespace sk
