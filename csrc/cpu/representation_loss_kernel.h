// The L1 representation loss and its gradient over raw pointers. Forward reads both inputs once and leaves one byte an
// element for backward, which reads that byte and writes the gradient.
#pragma once
#include <cstdint>

#include "../dtype.h"
#include "isa.h"

namespace sk {

constexpr int8_t kNanSign = -2;  // beside -1, 0 and 1

template <class Key>
struct RepresentationLossKernel {
  using C = ComputeOf<Key>;

  // sum |features - targets|, in one order on every ISA; signs of the differences unless `signs` is null.
  double (*forward)(const void* features, const void* targets, int64_t n, int8_t* signs);
  // gradient = sign * scale; `stream`: write past the caches.
  void (*backward)(const int8_t* signs, int64_t n, C scale, bool stream, void* gradient);
};

using RepresentationLossKernels = PerDtype<RepresentationLossKernel>;

SK_DECLARE_KERNELS(RepresentationLossKernels, representation_loss_kernels);

}  // namespace sk
