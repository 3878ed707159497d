// A library of its own, with the names and schemas of csrc/ops.cpp, less what Triton alone can do, and with `found`,
// where under nonfinite="error" the caller looks later whether there was any: on CUDA tensors Python chooses between
// these kernels and Triton's. For the emulator it is another library, and the key is CPU.
#pragma once
#include <torch/csrc/stable/library.h>

#include "ops.h"

#define SK_REGISTER_CUDA_OPS(library, key)                                                                             \
  STABLE_TORCH_LIBRARY(library, m) {                                                                                   \
    m.def(                                                                                                             \
        "trim_thresholds(Tensor? base, Tensor[] experts, float[] density, str semantics=\"paper\", "                   \
        "str nonfinite=\"error\", *, Tensor(b!)? found=None) -> Tensor");                                              \
    m.def(                                                                                                             \
        "trim_limits(Tensor[] base, Tensor[] experts, float[] density, str semantics=\"paper\", "                      \
        "str nonfinite=\"error\", str[]? names=None, *, Tensor(b!)? found=None) -> (Tensor, Tensor)");                 \
    m.def(                                                                                                             \
        "ties_merge(Tensor? base, Tensor[] experts, float[] density, float lam=1.0, float[]? weights=None, "           \
        "str semantics=\"paper\", str elect=\"sum\", str reduce=\"mean\", bool normalize=True, bool rescale=False, "   \
        "str nonfinite=\"error\", Tensor? thresholds=None, *, Tensor(b!)? found=None) -> Tensor");                     \
    m.def(                                                                                                             \
        "ties_split(Tensor? base, Tensor[] experts, float[] density, float[]? weights=None, str semantics=\"paper\", " \
        "str elect=\"sum\", bool rescale=False, str nonfinite=\"error\", Tensor? thresholds=None, *, Tensor(b!)? "     \
        "found=None) -> Tensor");                                                                                      \
    m.def(                                                                                                             \
        "ties_merge_out(Tensor[] base, Tensor[] experts, float[] density, float lam=1.0, float[]? weights=None, "      \
        "str semantics=\"paper\", str elect=\"sum\", str reduce=\"mean\", bool normalize=True, bool rescale=False, "   \
        "str nonfinite=\"error\", Tensor? thresholds=None, int[]? cuts=None, str[]? names=None, *, "                   \
        "Tensor(a!)[] out, Tensor(b!)? found=None) -> ()");                                                            \
  }                                                                                                                    \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                                                                         \
    m.impl("trim_thresholds", TORCH_BOX(&sk::cuda::trim_thresholds));                                                  \
    m.impl("trim_limits", TORCH_BOX(&sk::cuda::trim_limits));                                                          \
    m.impl("ties_merge", TORCH_BOX(&sk::cuda::ties_merge));                                                            \
    m.impl("ties_split", TORCH_BOX(&sk::cuda::ties_split));                                                            \
    m.impl("ties_merge_out", TORCH_BOX(&sk::cuda::ties_merge_out));                                                    \
  }
