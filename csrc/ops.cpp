// Every op of the library. Implementations register themselves beside their kernels: csrc/cpu/<stem>.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(surgery_kernels, m) {
  // Exact thresholds [num_tasks] (float32, float64 for float64 inputs) of abs(expert - base).
  m.def(
      "trim_thresholds(Tensor? base, Tensor[] experts, float[] density, str semantics=\"paper\", "
      "str nonfinite=\"error\") -> Tensor");

  // One tensor. density: one per expert; thresholds replace it. weights: one per expert, or none.
  m.def(
      "ties_merge(Tensor? base, Tensor[] experts, float[] density, float lam=1.0, float[]? weights=None, "
      "str semantics=\"paper\", str elect=\"sum\", str reduce=\"mean\", bool normalize=True, bool rescale=False, "
      "str nonfinite=\"error\", Tensor? thresholds=None) -> Tensor");

  // Entries of every expert that agree with the elected sign: [num_tasks, *shape].
  m.def(
      "ties_split(Tensor? base, Tensor[] experts, float[] density, float[]? weights=None, str semantics=\"paper\", "
      "str elect=\"sum\", bool rescale=False, str nonfinite=\"error\", Tensor? thresholds=None) -> Tensor");

  // Several tensors as one scope: thresholds, tie order and the sign of drawn elections are shared. base: one per
  // tensor, or none; experts: all experts of the first tensor, then of the second, ...; names: for messages.
  m.def(
      "ties_merge_out(Tensor[] base, Tensor[] experts, float[] density, float lam=1.0, float[]? weights=None, "
      "str semantics=\"paper\", str elect=\"sum\", str reduce=\"mean\", bool normalize=True, bool rescale=False, "
      "str nonfinite=\"error\", Tensor? thresholds=None, str[]? names=None, *, Tensor(a!)[] out) -> ()");

  // base + lam * sum_t weights[t] * (expert_t - base) / divisor over several tensors; without base the experts are
  // summed.
  m.def(
      "linear_merge_out(Tensor[] base, Tensor[] experts, float[] weights, float lam=1.0, float divisor=1.0, "
      "str nonfinite=\"error\", str[]? names=None, *, Tensor(a!)[] out) -> ()");

  // base + sum_t coefficients[t, block] * task_vectors[t]. Flat tensors; coefficients: [num_tasks, num_blocks] in the
  // compute type; block_offsets: int64 [num_blocks + 1]. Differentiable in the coefficients.
  m.def("combine(Tensor base, Tensor[] task_vectors, Tensor coefficients, Tensor block_offsets) -> Tensor");

  // Its gradient [num_tasks, num_blocks] in the compute type: <grad, task_vectors[t]> over every block.
  m.def("combine_backward(Tensor grad, Tensor[] task_vectors, Tensor block_offsets) -> Tensor");
}
