"""Methods that look at inputs: Fisher, RegMean and RegMean++ as they merge, AdaMerging and Concrete as they learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fusion_bench.method.fisher_merging import fisher_merging
from fusion_bench.method.regmean import regmean
from fusion_bench.method.regmean_plusplus import regmean_plusplus
from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel
from torch import Tensor

from ...merging import merge_state_dicts
from ...ops.combine import combine
from ..tensors import mergeable
from .stock import stands_in, stock

Parameters = Mapping[str, Sequence[Tensor]]  # of every model
OfModels = Sequence[Mapping[str, Tensor]]


@stands_in(fisher_merging, "merging_with_fisher_weights")
@torch.no_grad()
def with_fisher_weights(
    models_to_merge_param_dict: Parameters,
    models_to_merge_fisher_weights_list: OfModels,
    fisher_scaling_coefficients: Tensor,
    normalize_fisher_weight: bool = True,
    minimal_fisher_weight: float = 1e-6,
) -> dict[str, Tensor]:
    """The mean by Fisher information, to which FusionBench adds the least one, where the paper has a floor."""
    fishers = [dict(of_model) for of_model in models_to_merge_fisher_weights_list]
    parameters = models_to_merge_param_dict
    known = all(name in of_model for of_model in fishers for name in parameters)
    if not (known and minimal_fisher_weight > 0 and _takes(parameters)):
        theirs = stock(fisher_merging, "merging_with_fisher_weights")
        return theirs(parameters, fishers, fisher_scaling_coefficients, normalize_fisher_weight, minimal_fisher_weight)
    weights = fisher_scaling_coefficients.double()
    if normalize_fisher_weight:
        squares = [sum(float(of_model[name].double().square().sum()) for name in parameters) for of_model in fishers]
        shares = 1 / (torch.tensor(squares, dtype=torch.float64).sqrt() + minimal_fisher_weight)
        weights = weights * (shares / shares.sum()).to(weights.device)
    return merge_state_dicts(
        None,
        _states(parameters),
        method="fisher",
        fishers=[{name: of_model[name] + minimal_fisher_weight for name in parameters} for of_model in fishers],
        weights=weights.tolist(),
        floor=minimal_fisher_weight,
        progress=False,
    )


@torch.no_grad()
def with_regmean_weights(
    models_to_merge_param_dict: Parameters,
    models_to_merge_regmean_weights_list: OfModels,
    reduce_non_diagonal_ratio: float = 1.0,
    weight_transpose: bool = True,
) -> dict[str, Tensor]:
    """RegMean of the matrices whose inputs are known, the mean of the rest. Solved in float64, where FusionBench
    inverts in the parameters' own dtype; inputs of few rows have a solution too."""
    parameters = dict(models_to_merge_param_dict)
    grams = [
        {f"{name}.weight": gram for name, gram in of_model.items()} for of_model in models_to_merge_regmean_weights_list
    ]
    known = [name for name in grams[0] if name in parameters]
    if not _takes(parameters):
        theirs = stock(regmean, "merging_with_regmean_weights")
        return theirs(parameters, models_to_merge_regmean_weights_list, reduce_non_diagonal_ratio, weight_transpose)
    turned = [] if weight_transpose else known  # a Conv1D of GPT-2 is [in, out]
    parameters |= {name: [x.T for x in parameters[name]] for name in turned}
    result = merge_state_dicts(
        None,
        _states(parameters),
        method="regmean",
        grams=[{name: of_model[name].to(parameters[name][0].device) for name in known} for of_model in grams],
        off_diagonal=reduce_non_diagonal_ratio,
        progress=False,
    )
    return result | {name: result[name].T for name in turned}


for _module in (regmean, regmean_plusplus):
    stands_in(_module, "merging_with_regmean_weights")(with_regmean_weights)


@stands_in(LayerWiseMergedModel, "merge_weights")
def merge_by_layer(self: Any, task_vector_mask: Any = None) -> dict[str, Tensor]:
    """One `combine` of all parameters, whose backward gives the coefficients their gradient."""
    names = [name for name, _ in self.task_vectors[0].named_parameters()]
    state = None
    if not self.nromalized_merging_weights and self.merge_weight.shape[1:] == (len(names),):
        state = _combined(self, names, task_vector_mask, by_layer=True)
    return state or stock(LayerWiseMergedModel, "merge_weights")(self, task_vector_mask)


@stands_in(TaskWiseMergedModel, "merge_weights")
def merge_by_task(self: Any, task_vector_mask: Any = None) -> dict[str, Tensor]:
    """The same with one coefficient for each task."""
    names = [name for name, _ in self.task_vectors[0].named_parameters()]
    state = _combined(self, names, task_vector_mask, by_layer=False) if self.merge_weight.dim() == 1 else None
    return state or stock(TaskWiseMergedModel, "merge_weights")(self, task_vector_mask)


def _combined(
    self: Any, names: list[str], mask: Mapping[str, Tensor] | None, *, by_layer: bool
) -> dict[str, Tensor] | None:
    """Fills the merged state dict of a model that is learned; None where the ops do not take it.

    Under a mask, which all experts share, their sum is: once, where FusionBench masks each of them.
    """
    if mask is not None and any(name not in mask for name in names):
        return None
    state = self.pretrained_model.state_dict(keep_vars=True)
    vectors = [dict(vector.named_parameters()) for vector in self.task_vectors]
    if not names or any(list(vector) != names for vector in vectors):
        return None
    tensors = [[state[name].detach() for name in names], *([x.detach() for x in vector.values()] for vector in vectors)]
    if not all(map(mergeable, zip(*tensors, strict=True))) or len({x.dtype for x in tensors[0]}) > 1:
        return None
    base, *flat = [_side_by_side(of_model) for of_model in tensors]
    for parameters, buffer in zip((state, *vectors), (base, *flat), strict=True):  # which hold them from here on
        for name, part in zip(names, _parts(buffer, tensors[0]), strict=True):
            parameters[name].data = part
    sizes = [x.numel() for x in tensors[0]]
    offsets = torch.tensor([0, *(sizes if by_layer else [sum(sizes)])], device=base.device).cumsum(0)
    weight = self.merge_weight.clamp(0, 1) if self.clamp_weights else self.merge_weight
    start = base if mask is None else torch.zeros_like(base)
    merged = combine(start, flat, weight if by_layer else weight[:, None], offsets)
    if mask is not None:
        merged = base + torch.cat([mask[name].flatten() for name in names]).to(base.device) * merged
    state |= dict(zip(names, _parts(merged, tensors[0]), strict=True))
    self._merged_state_dict = state
    return state


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """One flat tensor; no copy where they lie so already."""
    first = tensors[0]
    size = sum(x.numel() for x in tensors)
    if first.untyped_storage().nbytes() == size * first.itemsize:
        flat = torch.empty(0, dtype=first.dtype, device=first.device).set_(first.untyped_storage())
        if all(
            x.data_ptr() == part.data_ptr() and x.is_contiguous()
            for x, part in zip(tensors, _parts(flat, tensors), strict=True)
        ):
            return flat
    return torch.cat([x.flatten() for x in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in like]), like, strict=True)]


def _states(parameters: Parameters) -> list[dict[str, Tensor]]:
    first = next(iter(parameters.values()))
    return [{name: tensors[t] for name, tensors in parameters.items()} for t in range(len(first))]


def _takes(parameters: Parameters) -> bool:
    """Whether the ops merge all of them."""
    return bool(parameters) and all(
        mergeable([x.detach() for x in tensors]) and all(bool(x.isfinite().all()) for x in tensors)
        for tensors in parameters.values()
    )
