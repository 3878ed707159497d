"""FusionBench's TIES merging and task arithmetic with our ops. Needs the extra `fusion-bench`.

    fusion_bench method=ties_merging method._target_=surgery_kernels.integrations.fusion_bench.TiesMerging ...
    fusion_bench method=task_arithmetic method._target_=surgery_kernels.integrations.fusion_bench.TaskArithmetic ...

Options, configuration and result are theirs, tensor by tensor, buffers included: from five models on sums may differ in
the last bit, since torch adds them in another order, and in bfloat16 and float16 `TaskArithmetic` rounds once, where
FusionBench rounds after every operation. All models of the pool are in memory at once. What the ops do not take, CUDA
tensors and lazy state dicts for two, goes to FusionBench.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .. import merging
from .extras import missing
from .tensors import NONFINITE, mergeable

try:
    from fusion_bench.compat.modelpool import to_modelpool
    from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from fusion_bench.modelpool import BaseModelPool
except ImportError as error:
    raise missing("fusion_bench", "fusion-bench", error) from error

T5_EMBEDDING = "transformer.shared.weight"  # FusionBench gives it to all `remove_keys` of a model that has it

States = list[dict[str, Tensor]]  # of the pretrained model, then of the others


class TiesMerging(TiesMergingAlgorithm):
    """TIES as FusionBench and the paper have it: thresholds and drawn elections over the whole model."""

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | dict[str, nn.Module], **kwargs: Any) -> nn.Module:
        """The pool's pretrained model, with the merged parameters.

        Raises:
            ValueError: `threshold` or another option is out of range.
        """
        if not 0 < self.threshold <= 100:
            raise ValueError(f"threshold must be in (0, 100], got {self.threshold}")
        density = self.threshold / 100 if self.threshold > 1 else self.threshold
        method = merging.Ties(density, self.scaling_factor, reduce=self.merge_func, nonfinite=NONFINITE)
        modelpool = to_modelpool(modelpool)
        method.check(len(modelpool.model_names))
        with self.profile("loading models"):
            models = _models(modelpool)
            states = _one_dtype(_states(models, self.remove_keys))
        if not _takes(states):
            return super().run(modelpool, **kwargs)
        with self.profile("merging models"):
            merged = _merged(states, method)
        self.print_profile_summary()
        if T5_EMBEDDING in merged:
            merged |= dict.fromkeys(self.remove_keys, merged[T5_EMBEDDING])
        models[0].load_state_dict(merged)
        return models[0]


class TaskArithmetic(TaskArithmeticAlgorithm):
    """``pretrained + scaling_factor * sum of (model - pretrained)``."""

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | dict[str, nn.Module]) -> nn.Module:
        """The pool's pretrained model, or with ``inplace=False`` a copy of it, with the merged parameters."""
        if not isinstance(modelpool, BaseModelPool):
            modelpool = BaseModelPool(modelpool)
        with self.profile("load model"):
            models = _models(modelpool)
            states = _states(models)
        floats, integers = ([_part(state, floating) for state in states] for floating in (True, False))
        # FusionBench takes no integer buffers that change, and keeps those that do not
        if not _takes(floats) or not all(_equal(other, integers[0]) for other in integers):
            return super().run(modelpool)
        with self.profile("merge weights"):
            merged = integers[0] | _merged(floats, merging.TaskArithmetic(self.scaling_factor, nonfinite=NONFINITE))
        self.print_profile_summary()
        model = models[0] if self.inplace else deepcopy(models[0])
        model.load_state_dict(merged)
        return model


def _models(modelpool: BaseModelPool) -> list[nn.Module]:
    return [modelpool.load_model(name) for name in ("_pretrained_", *modelpool.model_names)]


def _states(models: list[nn.Module], removed: Collection[str] = ()) -> States:
    """Empty where not all are modules: FusionBench has lazy state dicts as well."""
    if not all(isinstance(model, nn.Module) for model in models):
        return []
    return [{name: x for name, x in model.state_dict().items() if name not in removed} for model in models]


def _one_dtype(states: States) -> States:
    """FusionBench flattens a model into one vector, integer buffers too, in the dtype that holds them all."""
    widest = reduce(torch.promote_types, (x.dtype for state in states for x in state.values()), torch.uint8)
    return [{name: x.to(widest) for name, x in state.items()} for state in states]


def _part(state: dict[str, Tensor], floating: bool) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if x.is_floating_point() == floating}


def _equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


def _takes(states: States) -> bool:
    return (
        len(states) > 1
        and len(states[0]) > 0
        and all(state.keys() == states[0].keys() for state in states)
        and all(mergeable([state[name] for state in states]) for name in states[0])
    )


def _merged(states: States, method: merging.Method) -> dict[str, Tensor]:
    """Not `merge_state_dicts`: here tied tensors count as often as they have names."""
    base, *experts = states
    merged = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in base.items()}
    for names in [list(base)] if method.decides == "scope" else [[name] for name in base]:
        method.merge(
            merging.Scope(
                names=names,
                base=[base[name] for name in names],
                experts=[[expert[name] for expert in experts] for name in names],
                out=[merged[name] for name in names],
                owner={name: name for name in names},
            )
        )
    return merged
