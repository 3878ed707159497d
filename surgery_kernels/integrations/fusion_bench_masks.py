"""What experts keep of one shared model, from one read of them all, as FusionBench has it: EMR's and TALL's masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..merging import Scope
from ..merging.methods.masks import Emr, Packable, TallMasks
from ..ops.masks import unpack
from .models import State, takes
from .tensors import NONFINITE


@dataclass(frozen=True)
class Masked:
    """A shared model, what every expert keeps of it, and the experts' scales."""

    shared: State
    masks: dict[str, Tensor]  # bool [num_tasks, *shape]
    scales: list[float]


def emr(models: Sequence[nn.Module]) -> Masked | None:
    """By the means of tensors, as FusionBench scales. None where FusionBench has to."""
    return _masked(models, Emr(NONFINITE, task=0, rescale="tensor_means"))


def tall(models: Sequence[nn.Module], selectivity: float) -> Masked | None:
    return _masked(models, TallMasks(NONFINITE, selectivity, task=0))


def _masked(models: Sequence[nn.Module], method: Packable) -> Masked | None:
    """Of the parameters: FusionBench's modulators know no buffers. The first model is the base."""
    states = [{name: p.detach() for name, p in model.named_parameters()} for model in models]
    if not takes(states):
        return None
    base, *experts = states
    method.check(len(experts))
    shared = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in base.items()}
    bits = [x.new_empty(len(experts), -(-x.numel() // 8), dtype=torch.uint8) for x in base.values()]
    scope = Scope(
        names=list(base),
        base=list(base.values()),
        experts=[[expert[name] for expert in experts] for name in base],
        out=list(shared.values()),
        owner={name: name for name in base},
    )
    scales = method.pack(scope, bits)
    masks = {name: unpack(of, base[name].shape) for name, of in zip(base, bits, strict=True)}
    return Masked(shared, masks, scales)
