"""Exact trim thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts, PerExpert

_ops = torch.ops.surgery_kernels


def trim_thresholds(
    base: Tensor | None,
    experts: Experts,
    *,
    density: PerExpert,
    semantics: str = "paper",
    nonfinite: str = "error",
) -> Tensor:
    """The keep-th largest ``abs(expert - base)`` of every expert, exact and without a sort.

    The number kept of d entries is ``min(int(d * density) + 1, d)`` for "paper", ``max(1, int(d * density))`` for
    "mergekit" and ``int(d * density)`` for "peft"; density 1 keeps all.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None when `experts` already are
            task vectors.
        experts: List of num_tasks tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        density: Share of entries to keep, in (0, 1]; one number or one per expert.
        semantics: "paper", "mergekit" or "peft".
        nonfinite: "error" raises on NaN or infinity; "propagate" ranks them as the largest; "drop" takes them as 0.

    Returns:
        [num_tasks] float32, or float64 for float64 inputs, so that no threshold is ever rounded. 0 where everything
        is kept (an empty tensor too), infinity where "peft" keeps nothing.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names the expert and how many.

    Source: TIES-Merging (arXiv 2306.01708), section 3, step 1.
    """
    base, experts = arguments.check_experts(base, experts)
    arguments.check_one_of("semantics", semantics, arguments.SEMANTICS)
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    return _ops.trim_thresholds(
        base, experts, arguments.check_density(density, len(experts)), semantics=semantics, nonfinite=nonfinite
    )


def keep_count(numel: int, density: float, semantics: str) -> int:
    """How many of `numel` entries `density` keeps."""
    if density >= 1:
        return numel
    floor = int(density * numel)
    return min({"paper": floor + 1, "mergekit": max(1, floor), "exact": max(1, floor), "peft": floor}[semantics], numel)


@torch.library.register_fake("surgery_kernels::trim_thresholds")
def _(base: Tensor | None, experts: Sequence[Tensor], density: Sequence[float], *_: object, **__: object) -> Tensor:
    return _empty_thresholds(experts, len(density))


@torch.library.register_fake("surgery_kernels::trim_limits")
def _(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    density: Sequence[float],
    semantics: str = "paper",
    nonfinite: str = "error",
    names: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    count = len(density if ranks is None else ranks)
    return _empty_thresholds(experts, count), experts[0].new_empty(count, dtype=torch.int64)


def _empty_thresholds(experts: Sequence[Tensor], count: int) -> Tensor:
    return experts[0].new_empty(count, dtype=torch.promote_types(experts[0].dtype, torch.float32))
