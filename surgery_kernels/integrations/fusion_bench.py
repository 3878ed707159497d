"""FusionBench's algorithms with our ops. Needs the extra `fusion-bench`.

    python -m surgery_kernels.integrations.fusion_bench method=linear/simple_average ...    # fusion_bench's arguments

is `install()` followed by FusionBench's own command; in Python, `install()` is all it takes. Then TiesMerging,
TaskArithmetic, SimpleAverage, WeightedAverage, ExPO, MagMax, EMRMerging, DareTaskArithmetic, DareSimpleAverage,
DareTiesMerging, SlerpMerge, SlerpForCausalLM, and what FusionBench builds on them for language models, run on our ops,
on CPU and CUDA tensors; ModelStock takes its angles from `gram`. The classes below can be named alone:

    fusion_bench method=ties_merging method._target_=surgery_kernels.integrations.fusion_bench.TiesMerging ...

Options, configuration and result are theirs, tensor by tensor, buffers included: from five models on sums may differ in
the last bit, since torch adds them in another order, dot products are exact, and in bfloat16 and float16 everything but
TIES rounds once, where FusionBench rounds after every operation. EMRMerging adds up its norms in float64, and keeps
parameters alone, since FusionBench's modulators know no buffers; TallMaskTaskArithmetic has the paper's masks and is
not installed. DareTaskArithmetic draws masks of FusionBench's distribution from a counter, whose seed is torch's next
number; ``install(exact_draws=True)`` draws FusionBench's own. Where it drops everything the result is the pretrained
model, not NaN. All models of the pool are in memory at once. What the ops do not take (lazy state dicts, models that
differ in their tensors) goes to FusionBench.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from functools import partialmethod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import merging
from ..ops import gram, ties_merge
from ..ops.masks import pack
from . import fusion_bench_masks
from .extras import missing
from .models import fused, loaded, merged, of_one_dtype, state_of, takes
from .tensors import NONFINITE, mergeable, next_seed

try:
    from fusion_bench.compat.modelpool import to_modelpool
    from fusion_bench.method import (
        DareTaskArithmetic,
        ExPOAlgorithm,
        MagMaxAlgorithm,
        SimpleAverageAlgorithm,
        TallMaskTaskArithmeticAlgorithm,
        TaskArithmeticAlgorithm,
        TiesMergingAlgorithm,
        WeightedAverageAlgorithm,
    )
    from fusion_bench.method.dare import ties_merging as dare_ties
    from fusion_bench.method.emr_merging import EMRMerging as EMRMergingAlgorithm
    from fusion_bench.method.emr_merging.utils import EMRModulatedModel, EMRTaskModulator
    from fusion_bench.method.model_stock import model_stock
    from fusion_bench.method.slerp import slerp
    from fusion_bench.modelpool import BaseModelPool
except ImportError as error:
    raise missing("fusion_bench", "fusion-bench", error) from error

T5_EMBEDDING = "transformer.shared.weight"  # FusionBench gives it to all `remove_keys` of a model that has it
SLERP = {"DOT_THRESHOLD": 0.9995, "epsilon": 1e-8}  # the constants that our method has too

Pool: TypeAlias = "BaseModelPool | dict[str, nn.Module]"
StateMapping: TypeAlias = Mapping[str, Tensor]


def install(*, exact_draws: bool = False) -> None:
    """From here on FusionBench's algorithms run on our ops, in this process; twice is as once.

    Args:
        exact_draws: The random masks of DareTaskArithmetic and DareSimpleAverage are FusionBench's.
    """
    for algorithm, run in RUNS.items():
        algorithm.run = run
    DareTaskArithmetic.run = partialmethod(_dare, exact_draws=exact_draws)
    dare_ties.ties_merging = _ties_of_vectors
    slerp.slerp_on_state_dicts = _slerp
    model_stock.compute_angle = _angles


def main() -> None:
    """FusionBench's command with our ops."""
    from fusion_bench.scripts.cli import _hydra_main

    install()
    _hydra_main()


def _ties(self: Any, modelpool: Pool, **kwargs: Any) -> nn.Module:
    """TIES as FusionBench and the paper have it: thresholds and drawn elections over the whole model."""
    if not 0 < self.threshold <= 100:
        raise ValueError(f"threshold must be in (0, 100], got {self.threshold}")
    density = _density(self.threshold)
    method = merging.Ties(density, self.scaling_factor, reduce=self.merge_func, nonfinite=NONFINITE)
    modelpool = to_modelpool(modelpool)
    method.check(len(modelpool.model_names))
    with self.profile("loading models"):
        models = _models(modelpool)
        states = of_one_dtype([state_of(model, self.remove_keys) for model in models])
    if not takes(states):
        return STOCK[TiesMergingAlgorithm](self, modelpool, **kwargs)
    with self.profile("merging models"):
        result = merged(states, method)
    self.print_profile_summary()
    if T5_EMBEDDING in result:
        result |= dict.fromkeys(self.remove_keys, result[T5_EMBEDDING])
    return loaded(models[0], result)


def _task_arithmetic(self: Any, modelpool: Pool) -> nn.Module:
    """``pretrained + scaling_factor * sum of (model - pretrained)``."""
    modelpool = _pool(modelpool)
    with self.profile("load model"):
        models = _models(modelpool)
    method = _sum_of_changes(self.scaling_factor)
    with self.profile("merge weights"):
        result = fused([*map(state_of, models)], method)
    if result is None:
        return STOCK[TaskArithmeticAlgorithm](self, modelpool)
    self.print_profile_summary()
    return loaded(models[0], result, self.inplace)


def _simple_average(self: Any, modelpool: Pool) -> nn.Module:
    """The mean of the models, in the first of them."""
    modelpool = _pool(modelpool)
    with self.profile("load model"):
        models = _models(modelpool, pretrained=False)
    with self.profile("merge weights"):
        result = fused([*map(state_of, models)], merging.Average(nonfinite=NONFINITE))
    if result is None:
        return STOCK[SimpleAverageAlgorithm](self, modelpool)
    self.print_profile_summary()
    return loaded(models[0], result, self.inplace)


def _weighted_average(self: Any, modelpool: Pool) -> nn.Module:
    """The weighted sum of the models, in the first of them."""
    modelpool = _pool(modelpool)
    total = sum(self.weights) if self.normalize else 1.0
    if len(self.weights) != len(modelpool.model_names) or total == 0:
        return STOCK[WeightedAverageAlgorithm](self, modelpool)
    with self.profile("load_model"):
        models = _models(modelpool, pretrained=False)
    weights = [weight / total for weight in self.weights]
    with self.profile("merge weights"):
        result = fused([*map(state_of, models)], merging.Average(weights, False, nonfinite=NONFINITE), integers="none")
    if result is None:
        return STOCK[WeightedAverageAlgorithm](self, modelpool)
    if self.verbose:
        self.print_profile_summary()
    return loaded(models[0], result)


def _expo(self: Any, modelpool: Pool) -> nn.Module:
    """``aligned + extrapolation_factor * (aligned - pretrained)``, aligned the mean of the models."""
    modelpool = _pool(modelpool)
    if not (modelpool.has_pretrained and modelpool.model_names):
        return STOCK[ExPOAlgorithm](self, modelpool)
    models = _models(modelpool)
    pretrained, *states = map(state_of, models)
    mean = states[0] if len(states) == 1 else fused(states, merging.Average(nonfinite=NONFINITE))
    result = None if mean is None else fused([mean, pretrained], _sum_of_changes(-self.extrapolation_factor))
    return STOCK[ExPOAlgorithm](self, modelpool) if result is None else loaded(models[1], result)


def _magmax(self: Any, modelpool: Pool) -> nn.Module:
    """``pretrained + scaling_factor * the change of the largest magnitude``; of equal ones the last model's."""
    modelpool = _pool(modelpool)
    with self.profile("load model"):
        models = _models(modelpool)
    with self.profile("merge weights"):
        method = merging.METHODS["magmax"](self.scaling_factor, NONFINITE)  # type: ignore[call-arg]
        result = fused([*map(state_of, models)], method, integers="first")
    if result is None:
        return STOCK[MagMaxAlgorithm](self, modelpool)
    self.print_profile_summary()
    return loaded(models[0], result, self.inplace)


def _emr(self: Any, modelpool: Pool) -> nn.Module:
    """The pretrained model with a modulator of every task."""
    modelpool = _pool(modelpool)
    models = _models(modelpool)
    found = fusion_bench_masks.emr(models)
    if found is None:
        return STOCK[EMRMergingAlgorithm](self, modelpool)
    base = dict(models[0].named_parameters())
    vector = {name: shared - base[name].detach() for name, shared in found.shared.items()}
    result = EMRModulatedModel(backbone=models[0], modulators={}, unified_task_vector=vector)
    for t, name in enumerate(modelpool.model_names):
        masks = {key: of_tensor[t] for key, of_tensor in found.masks.items()}
        result.add_modulator(name, EMRTaskModulator(mask=masks, rescaler=found.scales[t]))
    return result


@torch.no_grad()
def _dare(self: Any, modelpool: BaseModelPool, *, exact_draws: bool = False) -> nn.Module:
    """``pretrained + scaling_factor * sum of (model - pretrained) with entries dropped at random``."""
    models = [modelpool.load_pretrained_model(), *(modelpool.load_model(name) for name in modelpool.model_names)]
    states = [{name: p.data for name, p in model.named_parameters() if p.requires_grad} for model in models]
    names, *others = [_dropped(model, self.only_on_linear_weights) for model in models]
    once = len(set(names)) == len(names) and all(other == names for other in others)
    share = self.sparsity_ratio
    if not (0 <= share <= 1 and takes(states) and once):
        return STOCK[DareTaskArithmetic](self, modelpool)
    drawn = [_draws(model, names, share) for model in models[1:]] if exact_draws else []
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


def _dropped(model: nn.Module, only_on_linear_weights: bool) -> list[str]:
    """The parameters whose entries are dropped, in FusionBench's order; a weight of two layers comes twice."""
    names = {id(p): name for name, p in model.named_parameters()}
    if only_on_linear_weights:
        return [names[id(module.weight)] for module in model.modules() if isinstance(module, nn.Linear)]
    return list(names.values())


def _draws(model: nn.Module, names: list[str], share: float) -> dict[str, Tensor]:
    """FusionBench's masks of one model, packed."""
    return {name: pack((torch.rand_like(model.get_parameter(name)) > share)[None])[0] for name in names}


@torch.no_grad()
def _ties_of_vectors(flat_task_checks: Tensor, reset_thresh: float, merge_func: str = "") -> Tensor:
    """TIES of the rows of a matrix."""
    rows = list(flat_task_checks)
    return ties_merge(None, rows, density=_density(reset_thresh), reduce=merge_func, nonfinite=NONFINITE)


def _slerp(t: float, primary: StateMapping, secondary: StateMapping, **options: Any) -> dict[str, Tensor]:
    """In float32, as FusionBench has it."""
    constants = {name: options.get(name, value) for name, value in SLERP.items()}
    slerp_of: Any = merging.METHODS["slerp"]
    result: dict[str, Tensor] = {}
    for name in secondary:
        pair = [state[name] for state in (primary, secondary)]
        if constants == SLERP and mergeable(pair):
            wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in pair]
            result |= merged([{name: x} for x in wide], slerp_of(t, nonfinite=NONFINITE))
        else:
            result |= STOCK_SLERP(t, {name: pair[0]}, {name: pair[1]}, **constants)
    return result


def _angles(
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
            angles |= STOCK_ANGLES(*one, ignore_keys, return_cos)
    return angles


def _sum_of_changes(scale: float) -> merging.Method:
    """``base + scale * sum of all changes``, rounded once."""
    return merging.Ties(1.0, scale, semantics="exact", elect="none", reduce="sum", nonfinite=NONFINITE)


def _density(threshold: float) -> float:
    """FusionBench's thresholds above 1 are percentages."""
    return threshold / 100 if threshold > 1 else threshold


def _pool(modelpool: Pool) -> BaseModelPool:
    return modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)


def _models(modelpool: BaseModelPool, pretrained: bool = True) -> list[nn.Module]:
    return [modelpool.load_model(name) for name in (["_pretrained_"] if pretrained else []) + modelpool.model_names]


RUNS: dict[Any, Callable[..., nn.Module]] = {
    TiesMergingAlgorithm: torch.no_grad()(_ties),
    TaskArithmeticAlgorithm: torch.no_grad()(_task_arithmetic),
    SimpleAverageAlgorithm: torch.no_grad()(_simple_average),
    WeightedAverageAlgorithm: torch.no_grad()(_weighted_average),
    ExPOAlgorithm: torch.no_grad()(_expo),
    MagMaxAlgorithm: torch.no_grad()(_magmax),
    EMRMergingAlgorithm: torch.no_grad()(_emr),
    DareTaskArithmetic: _dare,
}
# what is not taken, and what install() replaces
STOCK = {algorithm: algorithm.run for algorithm in RUNS}
STOCK_SLERP, STOCK_ANGLES = slerp.slerp_on_state_dicts, model_stock.compute_angle


class TiesMerging(TiesMergingAlgorithm):
    """TIES as FusionBench and the paper have it: thresholds and drawn elections over the whole model."""

    run = RUNS[TiesMergingAlgorithm]


class TaskArithmetic(TaskArithmeticAlgorithm):
    """``pretrained + scaling_factor * sum of (model - pretrained)``."""

    run = RUNS[TaskArithmeticAlgorithm]


class SimpleAverage(SimpleAverageAlgorithm):
    """The mean of the models."""

    run = RUNS[SimpleAverageAlgorithm]


class WeightedAverage(WeightedAverageAlgorithm):
    """The weighted sum of the models."""

    run = RUNS[WeightedAverageAlgorithm]


class ExPO(ExPOAlgorithm):
    """From the pretrained model past the mean of the others."""

    run = RUNS[ExPOAlgorithm]


class MagMax(MagMaxAlgorithm):
    """``pretrained + scaling_factor * the change of the largest magnitude``."""

    run = RUNS[MagMaxAlgorithm]


class EMRMerging(EMRMergingAlgorithm):
    """EMR with the scales of FusionBench: sums of the means of tensors, where the paper has one norm."""

    run = RUNS[EMRMergingAlgorithm]


class TallMaskTaskArithmetic(TallMaskTaskArithmeticAlgorithm):
    """The paper's masks. FusionBench 0.2.33 refuses its own tensors, and would compare weights with their changes."""

    @torch.no_grad()
    def run(self, modelpool: Pool) -> dict[str, Any]:
        modelpool = _pool(modelpool)
        with self.profile("load model"):
            pretrained, *others = _models(modelpool)
        with self.profile("compress and retrieve"):
            found = fusion_bench_masks.tall([pretrained, *others], self.tall_mask_lambda)
        if found is None:
            return super().run(modelpool)
        models = {}
        for t, name in enumerate(modelpool.model_names):
            models[name] = deepcopy(pretrained)
            for key, parameter in models[name].named_parameters():
                parameter.copy_(torch.where(found.masks[key][t], found.shared[key], parameter))
        self.print_profile_summary()
        return {"models": models, "metadata": None}


if __name__ == "__main__":
    main()
