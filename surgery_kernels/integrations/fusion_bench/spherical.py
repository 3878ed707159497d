"""Angles between models: SLERP and Model Stock."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from fusion_bench.method.model_stock import model_stock
from fusion_bench.method.slerp import slerp
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn

from ... import merging
from ...ops import gram
from ..tensors import NONFINITE, mergeable
from .states import merged, whole
from .stock import stands_in, stock

CONSTANTS = {"DOT_THRESHOLD": 0.9995, "epsilon": 1e-8}  # of SLERP, which our method has too

StateMapping = Mapping[str, Tensor]


def _of_modules(algorithm: Any) -> Callable[..., nn.Module]:
    """FusionBench's, which cannot put its result into the module of a lazy model."""

    def run(self: Any, modelpool: BaseModelPool) -> nn.Module:
        return stock(algorithm)(self, whole(modelpool))

    return run


for _algorithm in (model_stock.ModelStock, slerp.SlerpMergeAlgorithm, slerp.SlerpForCausalLM):
    stands_in(_algorithm)(_of_modules(_algorithm))


@stands_in(slerp, "slerp_on_state_dicts")
def slerp_on_state_dicts(t: float, primary: StateMapping, secondary: StateMapping, **options: Any) -> dict[str, Tensor]:
    """In float32, as FusionBench has it."""
    constants = {name: options.get(name, value) for name, value in CONSTANTS.items()}
    slerp_of: Any = merging.METHODS["slerp"]
    result: dict[str, Tensor] = {}
    for name in secondary:
        pair = [state[name] for state in (primary, secondary)]
        if constants == CONSTANTS and mergeable(pair):
            wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in pair]
            result |= merged([{name: x} for x in wide], slerp_of(t, nonfinite=NONFINITE))
        else:
            theirs = stock(slerp, "slerp_on_state_dicts")
            result |= theirs(t, {name: pair[0]}, {name: pair[1]}, **constants)
    return result


@stands_in(model_stock, "compute_angle")
def compute_angle(
    first: StateMapping,
    second: StateMapping,
    base: StateMapping,
    ignore_keys: Collection[str] = (),
    return_cos: bool = False,
) -> dict[str, float]:
    """Between two task vectors, by tensor, in degrees."""
    angles = {}
    for name in base:
        tensors = [state[name] for state in (base, first, second)] if name not in ignore_keys else []
        if mergeable(tensors):
            dots = gram(tensors[0], tensors[1:], rounded=True, nonfinite=NONFINITE)
            cosine = float(dots[0, 1] / ((dots[0, 0] * dots[1, 1]).sqrt() + model_stock.EPS))
            cosine = min(max(cosine, -1.0), 1.0)
            angles[name] = cosine if return_cos else math.degrees(math.acos(cosine))
        else:
            one = [{name: state[name]} for state in (first, second, base)]
            angles |= stock(model_stock, "compute_angle")(*one, ignore_keys, return_cos)
    return angles
