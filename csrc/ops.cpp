// Every op of the library. Implementations register themselves beside their kernels: csrc/cpu/<stem>.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(surgery_kernels, m) {
  // Exact thresholds [num_tasks] (float32, float64 for float64 inputs) of abs(expert - base).
  m.def(
      "trim_thresholds(Tensor? base, Tensor[] experts, float[] density, str semantics=\"paper\", "
      "str nonfinite=\"error\") -> Tensor");

  // The same over several tensors as one scope, and where ties end (int64 [num_tasks]): an entry is kept when its
  // magnitude is above the threshold, or equals it and its flat index within the scope is below the cut. Tensors as in
  // ties_merge_out. ranks: as many for every expert, one expert after the other, decide in place of density and
  // semantics; the results are [ranks]. Rank r > 0 keeps the r largest; 0 keeps none. Rank -s is about the s smallest:
  // those below its threshold, the s-th smallest, and those that equal it before the cut.
  m.def(
      "trim_limits(Tensor[] base, Tensor[] experts, float[] density, str semantics=\"paper\", "
      "str nonfinite=\"error\", str[]? names=None, int[]? ranks=None) -> (Tensor, Tensor)");

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
  // tensor, or none; experts: all experts of the first tensor, then of the second, ...; names: for messages. cuts:
  // those of trim_limits beside its thresholds, less the elements of its scope before this call's; without them all
  // ties stay. What the limits keep is kept where it also passes
  //   keep: the bits of the op masks, one tensor per merged tensor, or [1, bytes] for all experts;
  //   upper, upper_cuts: limits as thresholds and cuts, whose entries go; without cuts the ties stay;
  //   keep_density: the bits that the op masks draws by rule "random" under seed, tensor_ids and task_ids.
  // scales: float64 [num_tensors, num_tasks], factors of kept entries, as those of rescale. unique_scales: alike, of
  // entries that are the only one of their element, with reduce "unique". Elements with fewer than min_count kept
  // entries are those of the base.
  m.def(
      "ties_merge_out(Tensor[] base, Tensor[] experts, float[] density, float lam=1.0, float[]? weights=None, "
      "str semantics=\"paper\", str elect=\"sum\", str reduce=\"mean\", bool normalize=True, bool rescale=False, "
      "str nonfinite=\"error\", Tensor? thresholds=None, int[]? cuts=None, str[]? names=None, *, "
      "Tensor[]? keep=None, Tensor? upper=None, int[]? upper_cuts=None, Tensor? scales=None, "
      "float[]? keep_density=None, int seed=0, int[]? tensor_ids=None, int[]? task_ids=None, int min_count=0, "
      "Tensor? unique_scales=None, Tensor(a!)[] out) -> ()");

  // out_j = base_coefficients[j] * base + sum_t coefficients[j, t] * (expert_t - base) / divisor over several tensors,
  // each with all its outputs in turn; of the experts themselves without task_vectors or base. coefficients: float64
  // [num_outputs, num_tasks, num_blocks], base_coefficients: [num_outputs, num_blocks], or base is added as it is; one
  // block, or one for every tensor, row or column of all of them. fused: a product and its addition are rounded once.
  // An out may be an input of its own tensor. fresh: what lies in out is nothing to keep where NaN or infinity raises,
  // which is noticed while merging, from the one read.
  m.def(
      "mix_out(Tensor[] base, Tensor[] experts, Tensor coefficients, Tensor? base_coefficients=None, "
      "float divisor=1.0, bool task_vectors=True, bool fused=False, str axis=\"tensor\", str nonfinite=\"error\", "
      "str[]? names=None, *, bool fresh=False, Tensor(a!)[] out) -> ()");

  // base + sum_t w_t (expert_t - base) / sum_t w_t over several tensors, w_t = weights[t] * max(importance_t, floor);
  // the mean of the experts without base. Tensors as in ties_merge_out; importance: like experts, in their dtype or the
  // compute type; called: what messages call it. What raises for numbers leaves nothing to use in out.
  m.def(
      "weighted_merge_out(Tensor[] base, Tensor[] experts, Tensor[] importance, float[] weights, float floor=0.0, "
      "str nonfinite=\"error\", str[]? names=None, str called=\"importance\", *, Tensor(a!)[] out) -> ()");

  // The same with weights by PCB's scores, and changes c_t clipped: base + sum_t w_t factor_t c_t / sum_t w_t, w_t =
  // max(score_t - threshold_t, 0) / height_t. clipping: float64 [num_tasks, 3], the lowest and the highest magnitude of
  // a change and how far apart they are. limits: float64 [num_tasks, 3], threshold, height and factor of each. inter:
  // csrc/cpu/weighted_merge_kernel.h. drop: task vectors that are not finite are 0; else they take part.
  m.def(
      "weighted_merge_scored_out(Tensor[] base, Tensor[] experts, Tensor clipping, Tensor limits, "
      "str inter=\"paper\", bool drop=False, *, Tensor(a!)[] out) -> ()");

  // Of every expert's scores over all the tensors the one of its rank, counted from the highest, and the highest:
  // [num_tasks, 2] in the compute type. Scores nearer to 0 than 2^-100 (float64: 2^-900), and NaN, count as 0.
  m.def(
      "weighted_merge_limits(Tensor[] base, Tensor[] experts, Tensor clipping, int[] ranks, str inter=\"paper\", "
      "bool drop=False) -> Tensor");

  // Which entries every expert keeps, drawn by counter: packed bits per tensor, uint8 [num_tasks, ceil(numel / 8)],
  // least significant first; and float64 [num_tensors, num_tasks, 3]: how many are kept, the L1 norm of the task vector
  // and that of its kept entries. rule "random": with probability density; "della": density - epsilon to density +
  // epsilon by rank of magnitude within a row. Words are those of philox.h for seed, tensor_ids (0, 1, ...), task_ids
  // (0, 1, ...).
  m.def(
      "masks(Tensor[] base, Tensor[] experts, float[] density, str rule=\"random\", float[]? epsilon=None, int seed=0, "
      "int[]? tensor_ids=None, int[]? task_ids=None, str nonfinite=\"propagate\", str[]? names=None) "
      "-> (Tensor[], Tensor)");

  // The products of all pairs of vectors in float64, [num_vectors, num_tasks, num_tasks]: expert - base (rounded to the
  // stored dtype where wanted), or the experts without base. Of each tensor; of each row or column of all of them, in
  // order; or one matrix of the whole model. Tensors as in ties_merge_out.
  m.def(
      "gram(Tensor[] base, Tensor[] experts, int num_tasks, str axis=\"tensor\", bool rounded=False, "
      "str nonfinite=\"error\", str[]? names=None) -> Tensor");

  // What task vectors do, from one read: counts int64 [num_tensors, ...] and sums float64 [num_tensors, ...], laid out
  // as in csrc/cpu/census_kernel.h. thresholds: float64 [num_tensors, num_tasks]; an entry is kept from there on.
  m.def("census(Tensor[] base, Tensor[] experts, int num_tasks, Tensor? thresholds=None) -> (Tensor, Tensor)");

  // A short program of element-wise steps (csrc/step.h: five integers each) over blocks of elements, each rounded where
  // it says so: one read of all inputs and one write. inputs: num_inputs for the first tensor, then for the second,
  // ...; out: as many for each as the program stores, which may be inputs; bits are uint8 [ceil(numel / 8)]. numbers:
  // float64 [num_blocks or 1, num_numbers], a block being a tensor, or a row or a column of one. wide: float64 inside.
  // Returns sums, float64 [num_blocks, num_sums].
  m.def(
      "steps_out(Tensor[] inputs, int num_inputs, int[] program, Tensor numbers, str axis=\"tensor\", "
      "bool wide=False, *, Tensor(a!)[] out) -> Tensor");

  // Limits of the keys that such a program stores, those of trim_limits: thresholds in the compute type and cuts among
  // the elements of its tensor, [num_blocks, num_ranks]. ranks: the same for every block, as in trim_limits. whole: of
  // each tensor, [num_tensors, num_ranks], though numbers are by row. Keys are not rounded; their magnitude counts, and
  // NaN is the largest.
  m.def(
      "steps_limits(Tensor[] inputs, int num_inputs, int[] program, Tensor numbers, int[] ranks, "
      "str axis=\"tensor\", bool wide=False, bool whole=False) -> (Tensor, Tensor)");

  // x^T W x, x^T W y and the sums of the rows of W x and W y of every task, W the diagonal of weights: [num_tasks, dim,
  // dim], [num_tasks, dim, y_dim], [num_tasks, dim], [num_tasks, y_dim]; y_dim is 0 without y. x, y: [num_tasks, rows,
  // dim], or [rows, dim], of which task t has the rows from offsets[t] to offsets[t + 1]. wide: in float64, else in the
  // compute type.
  m.def(
      "gram_cross(Tensor x, Tensor? y=None, Tensor? weights=None, int[]? offsets=None, bool wide=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // features - relu(features down^T) up^T - bias, each task with its own adapter: corrected, like features; the means
  // over tokens, or an empty tensor; what the backward reads again, or an empty tensor. features: [num_tasks, samples,
  // (tokens,) dim], or [samples, (tokens,) dim] with a task_index; bias: [num_tasks, dim]. activation "none": without
  // relu.
  m.def(
      "surgery_adapter(Tensor features, Tensor down, Tensor up, Tensor? task_index=None, bool token_mean=False, "
      "bool keep_hidden=False, Tensor? bias=None, str activation=\"relu\") -> (Tensor, Tensor, Tensor)");

  // The gradients of features, down, up and bias; empty where not needed.
  m.def(
      "surgery_adapter_backward(Tensor? grad, Tensor? grad_means, Tensor features, Tensor down, Tensor up, "
      "Tensor? task_index, Tensor hidden, bool need_features, bool need_adapter, bool need_bias=False, "
      "str activation=\"relu\") -> (Tensor, Tensor, Tensor, Tensor)");

  // Many steps of gather, forward, L1 loss, backward and Adam for each task's adapter on cached features: the losses
  // [steps, num_tasks]. features, targets: one [images, dim] per task; indices [steps, num_tasks, batch].
  m.def(
      "surgery_train(Tensor[] features, Tensor[] targets, Tensor(a!) down, Tensor(b!) up, Tensor(c!) down_moments, "
      "Tensor(d!) up_moments, Tensor indices, int step=0, float lr=1e-3, float beta1=0.9, float beta2=0.999, "
      "float eps=1e-8, int zero_grad_steps=0) -> Tensor");

  // mean |features - targets| over the last two dimensions [...], and, for backward, the signs of features - targets
  // (int8, -2 for NaN) like features, or [0] unless wanted.
  m.def("representation_loss(Tensor features, Tensor targets, bool with_signs) -> (Tensor, Tensor)");

  // The gradient of features in `dtype`: signs * grad / (rows * dim).
  m.def("representation_loss_backward(Tensor grad, Tensor signs, ScalarType dtype) -> Tensor");

  // base + sum_t coefficients[t, block] * task_vectors[t]. Flat tensors; coefficients: [num_tasks, num_blocks] in the
  // compute type; block_offsets: int64 [num_blocks + 1]. Differentiable in the coefficients.
  m.def("combine(Tensor base, Tensor[] task_vectors, Tensor coefficients, Tensor block_offsets) -> Tensor");

  // Its gradient [num_tasks, num_blocks] in the compute type: <grad, task_vectors[t]> over every block.
  m.def("combine_backward(Tensor grad, Tensor[] task_vectors, Tensor block_offsets) -> Tensor");

  // The same under a mask that all task vectors share, over its mean of every block: relaxed Bernoulli variables of
  // mask_logits [num_params], in the compute type, drawn by the words of philox.h for seed, block and place in the
  // block; or without noise. Returns the merge, and those means, float64 [num_blocks]. Differentiable in coefficients
  // and logits.
  m.def(
      "combine_masked(Tensor base, Tensor[] task_vectors, Tensor coefficients, Tensor block_offsets, "
      "Tensor mask_logits, float temperature, int? seed) -> (Tensor, Tensor)");

  // The gradients of coefficients and logits.
  m.def(
      "combine_masked_backward(Tensor grad, Tensor[] task_vectors, Tensor coefficients, Tensor block_offsets, "
      "Tensor mask_logits, Tensor means, float temperature, int? seed) -> (Tensor, Tensor)");

  // combine with coefficients [num_tasks, num_blocks, num_groups]: every block is parted at random into groups, by the
  // words of philox.h for seed, block and place in the block.
  m.def(
      "combine_grouped(Tensor base, Tensor[] task_vectors, Tensor coefficients, Tensor block_offsets, int seed) "
      "-> Tensor");

  // Its gradient [num_tasks, num_blocks, num_groups].
  m.def(
      "combine_grouped_backward(Tensor grad, Tensor[] task_vectors, Tensor block_offsets, int num_groups, int seed) "
      "-> Tensor");
}
