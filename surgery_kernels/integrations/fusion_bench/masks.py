"""What experts keep of one shared model, from one read of them all: EMR's and TALL's masks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from fusion_bench.method import TallMaskTaskArithmeticAlgorithm
from fusion_bench.method.emr_merging import EMRMerging
from fusion_bench.method.emr_merging.utils import EMRModulatedModel, EMRTaskModulator
from torch import Tensor, nn

from ...merging import Scope
from ...merging.methods.masks import Emr, Packable, TallMasks
from ...ops.masks import unpack
from ..tensors import NONFINITE
from .states import Pool, models_of, pool_of, takes, whole
from .stock import stands_in, stock


@dataclass(frozen=True)
class Masked:
    """A shared model, what every expert keeps of it, and the experts' scales."""

    shared: dict[str, Tensor]
    masks: dict[str, Tensor]  # bool [num_tasks, *shape]
    scales: list[float]


@stands_in(EMRMerging)
@torch.no_grad()
def emr(self: Any, modelpool: Pool) -> nn.Module:
    """The pretrained model with a modulator of every task; scales are of tensors' means, as FusionBench has them."""
    modelpool = pool_of(modelpool)
    models = models_of(whole(modelpool))
    found = _masked(models, Emr(NONFINITE, task=0, rescale="tensor_means"))
    if found is None:
        return stock(EMRMerging)(self, modelpool)
    base = dict(models[0].named_parameters())
    vector = {name: shared - base[name].detach() for name, shared in found.shared.items()}
    result = EMRModulatedModel(backbone=models[0], modulators={}, unified_task_vector=vector)
    for t, name in enumerate(modelpool.model_names):
        masks = {key: of_tensor[t] for key, of_tensor in found.masks.items()}
        result.add_modulator(name, EMRTaskModulator(mask=masks, rescaler=found.scales[t]))
    return result


@stands_in(TallMaskTaskArithmeticAlgorithm)
@torch.no_grad()
def tall(self: Any, modelpool: Pool) -> dict[str, Any]:
    """The paper's masks. FusionBench 0.2.33 refuses its own tensors, and would compare weights with their changes."""
    modelpool = pool_of(modelpool)
    with self.profile("load model"):
        pretrained, *others = models_of(whole(modelpool))
    with self.profile("compress and retrieve"):
        found = _masked([pretrained, *others], TallMasks(NONFINITE, self.tall_mask_lambda, task=0))
    if found is None:
        return stock(TallMaskTaskArithmeticAlgorithm)(self, modelpool)
    models = {}
    for t, name in enumerate(modelpool.model_names):
        models[name] = deepcopy(pretrained)
        for key, parameter in models[name].named_parameters():
            parameter.copy_(torch.where(found.masks[key][t], found.shared[key], parameter))
    self.print_profile_summary()
    return {"models": models, "metadata": None}


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
