"""Weighted means of experts: by importance that is given for every element, or by the scores of PCB-Merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts, PerExpert

_ops = torch.ops.surgery_kernels

INTER = ("paper", "half", "raw")


def weighted_merge(
    base: Tensor | None,
    experts: Experts,
    importance: Experts,
    *,
    weights: PerExpert = 1.0,
    floor: float = 1e-6,
    nonfinite: str = "error",
    out: Tensor | None = None,
) -> Tensor:
    """``sum_t w_t expert_t / sum_t w_t`` for every element, with ``w_t = weights[t] * max(importance_t, floor)``.

    Bit-identical on every instruction set, thread count and device. Experts are added in their order in float32
    (float64 for float64 inputs), and the result is rounded once; everything is read once.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16: task vectors are averaged and added
            to it; None: the experts are averaged.
        experts: List of num_tasks >= 1 tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        importance: As many tensors of the shape of the experts, 0 or greater: of their dtype, or all of the one that is
            computed in (float32, float64 for float64 experts). The diagonal of the Fisher information for Fisher
            merging and for WiSE-FT's option of that name.
        weights: 0 or greater, one number or one per expert, not all 0.
        floor: Smaller importance counts as this, 0 or greater. Where it is 0 the mean of elements that have no
            importance is NaN.
        nonfinite: What NaN or infinity in an expert or a task vector does: "error" raises, "propagate" lets it take
            part, "drop" takes an entry of a task vector (of an expert without `base`) as 0. In importance it raises.
        out: Tensor like `base` that receives the result, apart from all others; lost where a RuntimeError is raised.

    Returns:
        A tensor like `base`; `out` where given. Carries no gradient. Empty for empty inputs.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; importance that is negative, NaN or infinite.

    Source: Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832), equation 3.
    """
    base, experts = arguments.check_experts(base, experts)
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    given = _check_importance(importance, experts)
    factors = arguments.per_expert("weights", weights, len(experts))
    for factor in factors:
        if factor < 0:
            raise ValueError(f"weights must be 0 or greater, got {factor}")
    if sum(factors) == 0:
        raise ValueError(f"weights must have a sum above 0, got {weights}")
    floor = arguments.number("floor", floor)
    if not 0 <= floor < math.inf:
        raise ValueError(f"floor must be finite and 0 or greater, got {floor}")
    result = _result(out, experts[0])
    _ops.weighted_merge_out(
        [] if base is None else [base],
        experts,
        given,
        factors,
        floor,
        nonfinite=nonfinite,
        out=[arguments.detached(result)],
    )
    if out is not None:
        torch.autograd.graph.increment_version(result)  # a graph that saved it must notice
    return result


def pcb_merge(
    base: Tensor | None,
    experts: Experts,
    *,
    density: PerExpert = 0.05,
    lam: float = 1.0,
    weights: PerExpert | None = None,
    clip: float = 0.01,
    inter: str = "paper",
    nonfinite: str = "error",
    out: Tensor | None = None,
) -> Tensor:
    """``base + lam * sum_t w_t weights[t] c_t / sum_t w_t``: PCB-Merging of one tensor.

    With c_t the task vector clipped to a range of magnitudes and s_t the same brought to [-1, 1], the score of an entry
    is ``exp(n s_t^2) * sum_j tanh(s_t s_j)`` for n experts, and w_t is how far it is above the score that `density`
    leaves, as a share of the distance of the highest one. exp and tanh are polynomials: the same bits on every
    instruction set, thread count and device. Base and experts are read three times, and nothing of their size is held.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None: the experts are task vectors,
            and the result is the merged one.
        experts: List of num_tasks >= 1 tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        density: Share of its entries that an expert has weights for, in (0, 1]; one number or one per expert.
        lam: Scale of the merged task vector.
        weights: Factors of the task vectors, one number or one per expert; None: 1.
        clip: Share of the entries whose magnitudes are clipped at either end, in [0, 0.5).
        inter: Agreement with the others: "paper" as above; "half": ``tanh(tau_t sum_j s_j)``; "raw":
            ``tanh(tau_t sum_j tau_j)``.
        nonfinite: What NaN or infinity in an input or a task vector does: "error" raises before anything is written,
            "propagate" lets it take part, "drop" takes an entry of a task vector as 0.
        out: Tensor like `base` that receives the result, apart from all others.

    Returns:
        A tensor like `base`; `out` where given. An expert whose changes all have one magnitude has no weight. Carries
        no gradient. Empty for empty inputs.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; `out` is untouched.

    Source: PCB-Merging (arXiv 2410.02396), as its authors' `pcb_ES.py` has it.
    """
    base, experts = arguments.check_experts(base, experts)
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    arguments.check_one_of("inter", inter, INTER)
    densities = arguments.check_density(density, len(experts))
    factors = arguments.check_weights(weights, len(experts))
    clip, lam = arguments.number("clip", clip), arguments.check_lam(lam)
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip must be in [0, 0.5), got {clip}")
    result = _result(out, experts[0])
    scored = Scored([] if base is None else [base], experts, len(experts), inter, nonfinite)
    clipping = scored.clipping(clip)
    limits = scored.limits(clipping, densities, [lam * factor for factor in factors])
    scored.merge(clipping, limits, [arguments.detached(result)])
    if out is not None:
        torch.autograd.graph.increment_version(result)
    return result


@dataclass(frozen=True)
class Scored:
    """Several tensors whose scores are compared with one another, as the ops take them, and what is decided of each
    expert: clipping and limits, [num_tasks, 3] float64 on the CPU."""

    base: Sequence[Tensor]
    experts: Sequence[Tensor]
    num_tasks: int
    inter: str = "paper"
    nonfinite: str = "error"
    names: Sequence[str] | None = None

    @property
    def numel(self) -> int:
        return sum(first.numel() for first in self.experts[:: self.num_tasks])

    def clipping(self, share: float) -> Tensor:
        """The magnitudes between which changes are clipped, and how far apart they are; infinitely for those that are
        all alike, so that none of them counts."""
        if self.numel == 0:
            return torch.zeros(self.num_tasks, 3, dtype=torch.float64, device="cpu")
        ranks = [-1 - int(self.numel * share), -1 - max(0, int(self.numel * (1 - share) - 1))]
        thresholds, _ = _ops.trim_limits(
            self.base,
            self.experts,
            [1.0] * self.num_tasks,
            semantics="mergekit",
            nonfinite=self.nonfinite,
            names=self.names,
            ranks=ranks * self.num_tasks,
        )
        low, high = thresholds.double().cpu().view(self.num_tasks, 2).unbind(1)
        return torch.stack((low, high, torch.where(high > low, high - low, math.inf)), dim=1)

    def limits(self, clipping: Tensor, density: Sequence[float], factors: Sequence[float]) -> Tensor:
        """The score above which an entry has a weight, the distance from there to the highest, and the factor of the
        changes."""
        if self.numel == 0:
            return torch.zeros(self.num_tasks, 3, dtype=torch.float64, device="cpu")
        ranks = [max(1, self.numel - int(self.numel * (1 - share))) for share in density]
        found = _ops.weighted_merge_limits(
            self.base, self.experts, clipping, ranks, inter=self.inter, drop=self.nonfinite == "drop"
        )
        threshold, top = found.double().cpu().unbind(1)
        height = torch.where(top > threshold, top - threshold, math.inf)
        return torch.stack((threshold, height, torch.tensor(factors, dtype=torch.float64, device="cpu")), dim=1)

    def merge(self, clipping: Tensor, limits: Tensor, out: Sequence[Tensor]) -> None:
        _ops.weighted_merge_scored_out(
            self.base,
            self.experts,
            clipping,
            limits,
            inter=self.inter,
            drop=self.nonfinite == "drop",
            out=out,
        )


def _check_importance(importance: Experts, experts: Sequence[Tensor]) -> list[Tensor]:
    given = list(importance.unbind(0)) if isinstance(importance, Tensor) else list(importance)
    if len(given) != len(experts):
        raise ValueError(f"importance must be one tensor per expert ({len(experts)}), got {len(given)}")
    first, compute = experts[0], arguments.compute_dtype(experts[0])
    for t, tensor in enumerate(given):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"importance[{t}] must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (first.dtype, compute) or tensor.dtype != given[0].dtype:
            raise ValueError(
                f"importance[{t}] must have the dtype of experts[0], {first.dtype}, or {compute} as all "
                f"others, got {tensor.dtype}"
            )
        if tensor.shape != first.shape:
            raise ValueError(
                f"importance[{t}] must have the shape of experts[0], {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"importance[{t}] must be on the device of experts[0], {first.device}, got {tensor.device}"
            )
    return [arguments.detached(tensor) for tensor in given]


def _result(out: Tensor | None, first: Tensor) -> Tensor:
    if out is None:
        return torch.empty_like(first, memory_format=torch.contiguous_format)
    arguments.check_like("out", out, first, "experts[0]")
    return out


@torch.library.register_fake("surgery_kernels::weighted_merge_out")
@torch.library.register_fake("surgery_kernels::weighted_merge_scored_out")
def _(*_: object, **__: object) -> None:
    return None


@torch.library.register_fake("surgery_kernels::weighted_merge_limits")
def _(base: Sequence[Tensor], experts: Sequence[Tensor], clipping: Tensor, *_: object, **__: object) -> Tensor:
    return experts[0].new_empty((clipping.shape[0], 2), dtype=arguments.compute_dtype(experts[0]))
