"""Methods whose result is linear in the models: averages, task arithmetic, interpolation and extrapolation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.ties_merge import check_options
from ..depths import depths
from ..method import SHARE, Method, arithmetic_of, model_weights, nonfinite_policy, per_model, shared, task_vector_scale
from ..scope import Scope

SMALLEST_SUM = 1e-8  # of weights that are divided by


@dataclass(frozen=True)
class Average(Method):
    """The weighted mean of the experts. The base is not read."""

    name = "average"
    title = "weighted averaging"
    formula = "sum_t weights[t] * expert_t / sum_t weights[t]"
    source = "Model Soups (arXiv 2203.05482)"
    base = "none"
    fused: ClassVar[bool] = False

    weights: PerExpert | None = per_model(None, key="weight", meaning="weight of each model")
    normalize: bool = shared(True, kind=bool, meaning="divide by the sum of the weights")
    nonfinite: str = nonfinite_policy()

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        weights = arguments.check_weights(self.weights, num_tasks)
        if self.normalize and abs(math.fsum(weights)) < SMALLEST_SUM:
            given = ", ".join(map(str, weights))
            raise ValueError(f"weights must have a sum other than 0 unless normalize is false, got {given}")

    def merge(self, scope: Scope) -> None:
        weights = arguments.check_weights(self.weights, scope.num_tasks)
        scope.mix(
            weights,
            divisor=self._sum(weights, scope.compute) if self.normalize else 1.0,
            fused=self.fused,
            task_vectors=False,
            nonfinite=self.nonfinite,
        )

    def _sum(self, weights: list[float], compute: torch.dtype) -> float:
        return math.fsum(weights)


@dataclass(frozen=True)
class Linear(Average):
    """The weighted mean of the models, with mergekit's rounding: a base model is one of them."""

    name = "linear"
    title = "weighted averaging"
    source = "mergekit 0.1.5 `linear`; Model Soups (arXiv 2203.05482)"
    ignored = ("int8_mask",)
    fused = True

    weights: PerExpert | None = model_weights("weight of each model")

    def _sum(self, weights: list[float], compute: torch.dtype) -> float:
        """As mergekit adds them up: of eight float32 or more in torch's order, which is not theirs."""
        return torch.tensor(weights, dtype=compute, device="cpu").sum().item()


@dataclass(frozen=True)
class Passthrough(Method):
    """One model as it is, scaled where a scale is given.

    Without a scale NaN and infinity are copied like the rest.
    """

    name = "passthrough"
    title = "passthrough"
    formula = "scale * model"
    source = "mergekit 0.1.5 `passthrough`"
    base = "none"
    num_experts = (1, 1)

    scale: PerExpert | None = per_model(None, meaning="factor of the model; none: it is copied")
    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 1

    def merge(self, scope: Scope) -> None:
        if self.scale is None:
            scope.copy(scope.flat_experts)
            return
        if self.nonfinite == "error":
            scope.check_finite(task_vectors=False)
        (scale,) = arguments.per_expert("scale", self.scale, 1)
        for model, out in zip(scope.flat_experts, scope.out, strict=True):
            torch.mul(model.nan_to_num(0, 0, 0) if self.nonfinite == "drop" else model, scale, out=out)


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """Adds the weighted task vectors to the base.

    Under ``nonfinite="error"`` a difference that overflows the dtype is refused too.
    """

    name = "task_arithmetic"
    title = "task arithmetic"
    formula = "base + lam * sum_t weights[t] * (expert_t - base)"
    source = "Editing Models with Task Arithmetic (arXiv 2212.04089), section 2"
    ignored = ("int8_mask",)

    lam: float = task_vector_scale()
    weights: PerExpert | None = model_weights()
    normalize: bool = shared(False, kind=bool, meaning="divide by the sum of the weights, unless that is below 1e-8")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        weights = arguments.check_weights(self.weights, scope.num_tasks)
        if self.arithmetic == "mergekit":
            options = check_options(
                scope.num_tasks,
                density=1.0,
                lam=self.lam,
                weights=weights,
                semantics="mergekit",
                elect="none",
                normalize=self.normalize,
                nonfinite=self.nonfinite,
            )
            torch.ops.surgery_kernels.ties_merge_out(
                scope.base, scope.flat_experts, **options, names=scope.names, out=scope.out
            )
            return
        scale = scaled_by_sum(self.lam, weights) if self.normalize else self.lam
        scope.mix([scale * weight for weight in weights], nonfinite=self.nonfinite)


def scaled_by_sum(lam: float, weights: list[float]) -> float:
    """lam over the sum of the weights, unless these cancel."""
    total = math.fsum(weights)
    return lam / total if abs(total) >= SMALLEST_SUM else lam


@dataclass(frozen=True)
class WiseFt(Method):
    """Between the base (t = 0) and one fine-tuned model (t = 1); beyond them outside [0, 1].

    `wise_ft_curve` gives many points from one read.
    """

    name = "wise_ft"
    title = "WiSE-FT"
    formula = "(1 - t) * base + t * expert"
    source = "Robust fine-tuning of zero-shot models (arXiv 2109.01903), equation 1"
    num_experts = (1, 1)

    t: float = shared(0.5, meaning="place between the base (0) and the expert (1)")
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        scope.mix([self.t], of_base=1 - self.t, task_vectors=False, nonfinite=self.nonfinite)


@dataclass(frozen=True)
class Dni(Method):
    """Deep network interpolation: networks of one architecture, all tensors, with weights that sum to 1."""

    name = "dni"
    title = "deep network interpolation"
    formula = "sum_t weights[t] * expert_t, sum_t weights[t] = 1"
    source = "Deep Network Interpolation (arXiv 1811.10515), equation 2"
    base = "none"

    weights: PerExpert = per_model(key="weight", meaning="share of each network")
    nonfinite: str = nonfinite_policy()

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        if abs(math.fsum(arguments.check_weights(self.weights, num_tasks)) - 1) > 1e-6:
            raise ValueError(f"weights must have the sum 1 for dni, got {self.weights}")

    def merge(self, scope: Scope) -> None:
        weights = arguments.check_weights(self.weights, scope.num_tasks)
        scope.mix(weights, task_vectors=False, nonfinite=self.nonfinite)


@dataclass(frozen=True)
class ExPO(Method):
    """Extrapolates alignment: from the supervised model (the base) past the mean of the aligned ones."""

    name = "expo"
    title = "ExPO"
    formula = "base + (1 + extrapolation) * (mean_t expert_t - base)"
    source = "Weak-to-Strong Extrapolation Expedites Alignment (arXiv 2404.16792)"

    extrapolation: float = shared(0.1, meaning="how far past the aligned models, in task vectors")
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        share = (1 + self.extrapolation) / scope.num_tasks
        scope.mix([share] * scope.num_tasks, nonfinite=self.nonfinite)


@dataclass(frozen=True)
class Lines(Method):
    """Task arithmetic whose scale grows with the depth of the layer; what lies in no layer gets the least."""

    name = "lines"
    title = "LiNeS"
    formula = "base + (first + (last - first) * layer / (layers - 1)) * sum_t weights[t] * (expert_t - base)"
    source = "LiNeS (arXiv 2410.17146), equation 3: first = alpha, last = alpha + beta"
    decides = "model"

    first: float = shared(meaning="scale of the first layer, and of what lies in none")
    last: float = shared(meaning="scale of the last layer")
    weights: PerExpert | None = per_model(None, key="weight", meaning="factor of each task vector")
    depth: float | None = shared(
        None,
        range=SHARE,
        recipe_default=(0.0, 1.0),
        meaning="where between first (0) and last (1) a tensor is; none: where its name says",
    )
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        weights = torch.tensor(arguments.check_weights(self.weights, scope.num_tasks), dtype=torch.float64)
        found = depths(scope.names) if self.depth is None else dict.fromkeys(scope.names, self.depth)
        depth = torch.tensor(list(found.values()), dtype=torch.float64)
        scales = self.first + (self.last - self.first) * depth
        scope.mix(weights[:, None] * scales, nonfinite=self.nonfinite)


@dataclass(frozen=True)
class MetaGpt(Method):
    """Task arithmetic that weighs every task vector by its squared norm over the model."""

    name = "metagpt"
    title = "MetaGPT"
    formula = "base + sum_t |tau_t|^2 / sum_s |tau_s|^2 * tau_t, tau_t = expert_t - base"
    source = "MetaGPT (arXiv 2406.11385), equation 15"
    decides = "model"
    recipe_scope = "model"

    nonfinite: str = nonfinite_policy()

    def decide(self, scope: Scope) -> dict[str, Any]:
        """The share of every task vector."""
        squares = scope.gram(axis="model", nonfinite=self.nonfinite)[0].diagonal()
        total = squares.sum()
        return {"shares": (squares / total if total > 0 else torch.full_like(squares, 1 / len(squares))).tolist()}

    def merge(self, scope: Scope) -> None:
        facts = self.decide(scope) if scope.decided is None else scope.decided
        scope.mix(facts["shares"], nonfinite=scope.checked(self.nonfinite))
