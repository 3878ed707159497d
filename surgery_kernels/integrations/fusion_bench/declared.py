"""Methods by their declarations: FusionBench's algorithms that are one of ours, and ours that FusionBench lacks."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from fusion_bench import BaseAlgorithm
from fusion_bench.method import (
    IsotropicMergingInCommonAndTaskSubspace,
    IsotropicMergingInCommonSubspace,
    TaskSingularVectorMerging,
    WUDIMerging,
)
from omegaconf import OmegaConf
from torch import nn

from ...merging import METHODS, Method, merge_state_dicts
from ..tensors import NONFINITE
from .states import Pool, fused, loaded, models_of, pool_of, state_of
from .stock import stands_in, stock

# FusionBench's algorithm -> our method, and by FusionBench's names of the options ours
SAME: dict[Any, tuple[str, dict[str, str]]] = {
    IsotropicMergingInCommonSubspace: ("iso_c", {"scaling_factor": "lam", "exclude_keys": "exclude"}),
    IsotropicMergingInCommonAndTaskSubspace: (
        "iso_cts",
        {"scaling_factor": "lam", "common_space_fraction": "common", "exclude_keys": "exclude"},
    ),
    TaskSingularVectorMerging: ("tsv_m", {"alpha": "lam", "exclude_keys": "exclude"}),
    WUDIMerging: ("wudi", {"iter_num": "steps", "exclude_keys": "exclude"}),
}
# options that our method does not have: FusionBench runs where they are not these
ONLY_THEIRS: dict[Any, dict[str, Any]] = {TaskSingularVectorMerging: {"return_single_task_models": False}}


def _method(algorithm: Any, values: Mapping[str, Any]) -> Method | None:
    """None where FusionBench has rules of its own for the values."""
    name, options = SAME[algorithm]
    if any(values[option] != only for option, only in ONLY_THEIRS.get(algorithm, {}).items()):
        return None
    given: dict[str, Any] = {"nonfinite": NONFINITE}
    for theirs, ours in options.items():
        value = values[theirs]
        if ours == "exclude":  # exact names there, patterns here
            value = tuple(map(glob.escape, value or ()))
        elif value is None:
            continue
        elif not isinstance(value, (int, float)):
            return None
        given[ours] = value
    return METHODS[name](**given)


def _run(algorithm: Any) -> Callable[..., nn.Module]:
    def run(self: Any, modelpool: Pool) -> nn.Module:
        modelpool = pool_of(modelpool)
        options = {*SAME[algorithm][1], *ONLY_THEIRS.get(algorithm, {})}
        method = _method(algorithm, {name: getattr(self, name) for name in options})
        if method is None:
            return stock(algorithm)(self, modelpool)
        method.check(len(modelpool.model_names))
        models = models_of(modelpool)
        result = fused([*map(state_of, models)], method)
        return stock(algorithm)(self, modelpool) if result is None else loaded(models[0], result)

    return torch.no_grad()(run)


for _algorithm in SAME:
    stands_in(_algorithm)(_run(_algorithm))


class Declared(BaseAlgorithm):
    """What the classes of methods share that FusionBench does not have: the parameters of a method are its options."""

    method: ClassVar[type[Method]]

    def __init__(self, **options: Any) -> None:
        known = [parameter.name for parameter in self.method.parameters()]
        for name in options:
            if name not in known and not name.startswith("_"):
                raise TypeError(f"options of {self.method.name} must be among {', '.join(known)}, got {name!r}")
        for name in known:
            if name in options:
                value = options.pop(name)
                setattr(self, name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
        super().__init__(**options)

    @torch.no_grad()
    def run(self, modelpool: Pool) -> nn.Module:
        """The merged model: the pretrained one, or where the method has none the first, with other parameters."""
        modelpool = pool_of(modelpool)
        method = self.method
        has_base = method.base == "required" or (method.base == "optional" and modelpool.has_pretrained)
        models = models_of(modelpool, pretrained=has_base)
        names = [parameter.name for parameter in method.parameters()]
        options = {name: value for name, value in vars(self).items() if name in names}
        states = [dict(model.items()) if isinstance(model, Mapping) else model.state_dict() for model in models]
        base, experts = (states[0], states[1:]) if has_base else (None, states)
        return loaded(models[0], merge_state_dicts(base, experts, method=method.name, **options))


THEIRS = {"average", "dare_linear", "dare_ties", "dni", "emr", "expo", "magmax", "model_stock", "slerp", "tall_masks"}
THEIRS |= {"task_arithmetic", "ties", *(name for name, _ in SAME.values())}


def lacking() -> dict[str, type[Method]]:
    """Methods that FusionBench does not have and that need no inputs, by the names of their classes here."""
    return {
        method.__name__: method for name, method in METHODS.items() if name not in THEIRS and not method.from_inputs
    }


def class_of(method: type[Method], module: str) -> type[Declared]:
    names = {parameter.name: parameter.name for parameter in method.parameters()}
    body = {
        "method": method,
        "__doc__": f"{method.summary()} Options: {', '.join(names)}.",
        "__module__": module,
        "_config_mapping": BaseAlgorithm._config_mapping | names,
    }
    return type(method.__name__, (Declared,), body)
