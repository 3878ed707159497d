"""Sums of models and of their changes: averages, task arithmetic, interpolation, ExPO, TIES, MagMax."""

from __future__ import annotations

from typing import Any

import torch
from fusion_bench.compat.modelpool import to_modelpool
from fusion_bench.method import (
    ExPOAlgorithm,
    LinearInterpolationAlgorithm,
    MagMaxAlgorithm,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    WeightedAverageAlgorithm,
)
from fusion_bench.method.dare import ties_merging as dare_ties
from torch import Tensor, nn

from ... import merging
from ...ops import ties_merge
from ..tensors import NONFINITE
from .states import Pool, fused, loaded, merged, models_of, of_one_dtype, pool_of, state_of, takes
from .stock import stands_in, stock

T5_EMBEDDING = "transformer.shared.weight"  # FusionBench gives it to all `remove_keys` of a model that has it


@stands_in(TiesMergingAlgorithm)
@torch.no_grad()
def ties(self: Any, modelpool: Pool, **kwargs: Any) -> nn.Module:
    """TIES as FusionBench and the paper have it: thresholds and drawn elections over the whole model."""
    if not 0 < self.threshold <= 100:
        raise ValueError(f"threshold must be in (0, 100], got {self.threshold}")
    density = density_of(self.threshold)
    method = merging.Ties(density, self.scaling_factor, reduce=self.merge_func, nonfinite=NONFINITE)
    modelpool = to_modelpool(modelpool)
    method.check(len(modelpool.model_names))
    with self.profile("loading models"):
        models = models_of(modelpool)
        states = [state_of(model, self.remove_keys) for model in models]
    if all(isinstance(model, nn.Module) for model in models):
        states = of_one_dtype(states)
        result = merged(states, method) if takes(states) else None
    else:
        result = fused(states, method)
    if result is None:
        return stock(TiesMergingAlgorithm)(self, modelpool, **kwargs)
    self.print_profile_summary()
    if T5_EMBEDDING in result:
        result |= dict.fromkeys(self.remove_keys, result[T5_EMBEDDING])
    return loaded(models[0], result)


@stands_in(dare_ties, "ties_merging")
@torch.no_grad()
def ties_of_vectors(flat_task_checks: Tensor, reset_thresh: float, merge_func: str = "") -> Tensor:
    """TIES of the rows of a matrix."""
    rows = list(flat_task_checks)
    return ties_merge(None, rows, density=density_of(reset_thresh), reduce=merge_func, nonfinite=NONFINITE)


@stands_in(TaskArithmeticAlgorithm)
@torch.no_grad()
def task_arithmetic(self: Any, modelpool: Pool) -> nn.Module:
    """``pretrained + scaling_factor * sum of (model - pretrained)``."""
    modelpool = pool_of(modelpool)
    with self.profile("load model"):
        models = models_of(modelpool)
    with self.profile("merge weights"):
        result = fused([*map(state_of, models)], sum_of_changes(self.scaling_factor))
    if result is None:
        return stock(TaskArithmeticAlgorithm)(self, modelpool)
    self.print_profile_summary()
    return loaded(models[0], result, self.inplace)


@stands_in(SimpleAverageAlgorithm)
@torch.no_grad()
def simple_average(self: Any, modelpool: Pool) -> nn.Module:
    """The mean of the models, in the first of them."""
    modelpool = pool_of(modelpool)
    with self.profile("load model"):
        models = models_of(modelpool, pretrained=False)
    with self.profile("merge weights"):
        result = fused([*map(state_of, models)], merging.Average(nonfinite=NONFINITE))
    if result is None:
        return stock(SimpleAverageAlgorithm)(self, modelpool)
    self.print_profile_summary()
    return loaded(models[0], result, self.inplace)


@stands_in(WeightedAverageAlgorithm)
@torch.no_grad()
def weighted_average(self: Any, modelpool: Pool) -> nn.Module:
    """The weighted sum of the models, in the first of them."""
    modelpool = pool_of(modelpool)
    total = sum(self.weights) if self.normalize else 1.0
    if len(self.weights) != len(modelpool.model_names) or total == 0:
        return stock(WeightedAverageAlgorithm)(self, modelpool)
    with self.profile("load_model"):
        models = models_of(modelpool, pretrained=False)
    weights = [weight / total for weight in self.weights]
    with self.profile("merge weights"):
        result = fused([*map(state_of, models)], merging.Average(weights, False, nonfinite=NONFINITE), integers="none")
    if result is None:
        return stock(WeightedAverageAlgorithm)(self, modelpool)
    if self.verbose:
        self.print_profile_summary()
    return loaded(models[0], result)


@stands_in(LinearInterpolationAlgorithm)
@torch.no_grad()
def linear_interpolation(self: Any, modelpool: Pool) -> nn.Module:
    """``(1 - t) * first + t * second``, in the first. FusionBench 0.2.33 compares a list with 2 and always stops."""
    modelpool = pool_of(modelpool)
    names = modelpool.all_model_names
    if len(names) != 2:
        raise ValueError(f"modelpool must have exactly 2 models, got {len(names)}")
    models = [modelpool.load_model(name) for name in names]
    mean = merging.Average([1 - self.t, self.t], False, nonfinite=NONFINITE)
    result = fused([*map(state_of, models)], mean, integers="first")
    return stock(LinearInterpolationAlgorithm)(self, modelpool) if result is None else loaded(models[0], result)


@stands_in(ExPOAlgorithm)
@torch.no_grad()
def expo(self: Any, modelpool: Pool) -> nn.Module:
    """``aligned + extrapolation_factor * (aligned - pretrained)``, aligned the mean of the models."""
    modelpool = pool_of(modelpool)
    if not (modelpool.has_pretrained and modelpool.model_names):
        return stock(ExPOAlgorithm)(self, modelpool)
    models = models_of(modelpool)
    pretrained, *states = map(state_of, models)
    mean = states[0] if len(states) == 1 else fused(states, merging.Average(nonfinite=NONFINITE))
    result = None if mean is None else fused([mean, pretrained], sum_of_changes(-self.extrapolation_factor))
    return stock(ExPOAlgorithm)(self, modelpool) if result is None else loaded(models[1], result)


@stands_in(MagMaxAlgorithm)
@torch.no_grad()
def magmax(self: Any, modelpool: Pool) -> nn.Module:
    """``pretrained + scaling_factor * the change of the largest magnitude``; of equal ones the last model's."""
    modelpool = pool_of(modelpool)
    with self.profile("load model"):
        models = models_of(modelpool)
    with self.profile("merge weights"):
        method = merging.METHODS["magmax"](self.scaling_factor, NONFINITE)  # type: ignore[call-arg]
        result = fused([*map(state_of, models)], method, integers="first")
    if result is None:
        return stock(MagMaxAlgorithm)(self, modelpool)
    self.print_profile_summary()
    return loaded(models[0], result, self.inplace)


def sum_of_changes(scale: float) -> merging.Method:
    """``base + scale * sum of all changes``, rounded once."""
    return merging.Ties(1.0, scale, semantics="exact", elect="none", reduce="sum", nonfinite=NONFINITE)


def density_of(threshold: float) -> float:
    """FusionBench's thresholds above 1 are percentages."""
    return threshold / 100 if threshold > 1 else threshold
