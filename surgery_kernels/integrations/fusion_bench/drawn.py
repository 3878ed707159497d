"""Changes of which random entries are dropped: DARE."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch
from fusion_bench.method import DareTaskArithmetic
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn

from ...ops import ties_merge
from ...ops.masks import pack
from ..tensors import NONFINITE, next_seed
from .states import models_of, takes, whole
from .stock import stands_in, stock


@stands_in(DareTaskArithmetic)
@torch.no_grad()
def dare(self: Any, modelpool: BaseModelPool, *, exact_draws: bool = False) -> nn.Module:
    """``pretrained + scaling_factor * sum of (model - pretrained) with entries dropped at random``."""
    models = models_of(whole(modelpool))
    states = [{name: p.data for name, p in model.named_parameters() if p.requires_grad} for model in models]
    names, *others = [dropped(model, self.only_on_linear_weights) for model in models]
    once = len(set(names)) == len(names) and all(other == names for other in others)
    share = self.sparsity_ratio
    if not (0 <= share <= 1 and takes(states) and once):
        return stock(DareTaskArithmetic)(self, modelpool)
    drawn = [draws(model, names, share) for model in models[1:]] if exact_draws else []
    scale = 1 / (1 - share) if self.rescale and share < 1 else 1.0
    seed = next_seed()
    for index, (name, base) in enumerate(states[0].items()):
        options: dict[str, Any] = {"semantics": "exact", "elect": "none", "reduce": "sum", "nonfinite": NONFINITE}
        options["lam"] = self.scaling_factor * (scale if name in names else 1.0)
        if name in names and exact_draws:
            options["keep"] = torch.stack([masks[name] for masks in drawn])
        elif name in names:
            options |= {"keep_density": 1 - share, "seed": seed, "tensor_id": index}
        base.copy_(ties_merge(base, [state[name] for state in states[1:]], density=1.0, **options))
    return models[0]


def draw_exactly() -> None:
    """From here on the masks are FusionBench's."""
    DareTaskArithmetic.run = partialmethod(dare, exact_draws=True)


def dropped(model: nn.Module, only_on_linear_weights: bool) -> list[str]:
    """The parameters whose entries are dropped, in FusionBench's order; a weight of two layers comes twice."""
    names = {id(p): name for name, p in model.named_parameters()}
    if only_on_linear_weights:
        return [names[id(module.weight)] for module in model.modules() if isinstance(module, nn.Linear)]
    return list(names.values())


def draws(model: nn.Module, names: list[str], share: float) -> dict[str, Tensor]:
    """FusionBench's masks of one model, packed."""
    return {name: pack((torch.rand_like(model.get_parameter(name)) > share)[None])[0] for name in names}
