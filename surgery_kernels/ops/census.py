"""How task vectors agree, and what is odd about the numbers of a model, from one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts, PerExpert

_ops = torch.ops.surgery_kernels


@dataclass(frozen=True)
class Census:
    """Counts are int64 and exact; sums are float64, added up in one order as those of `gram`.

    A change is a finite, nonzero ``expert - base`` in the compute type. Of models the base comes first.
    """

    nonfinite: Tensor  # [num_tasks + 1], NaN and infinity in each model
    zeros: Tensor  # [num_tasks + 1], entries of each model that are 0
    saturated: Tensor  # [num_tasks + 1], those that are the largest number of their dtype, or its negative
    changed: Tensor  # [num_tasks]
    kept: Tensor  # [num_tasks], changes of at least the threshold
    touched: Tensor  # [], entries that any expert changes
    conflicts: Tensor  # [], entries that one expert raises and another lowers
    kept_by_any: Tensor  # [], entries that an expert keeps
    kept_by_two: Tensor  # [], that at least two keep
    kept_conflicts: Tensor  # [], that one keeps raised and another lowered
    both: Tensor  # [num_tasks, num_tasks], symmetric: entries that both change; `changed` on the diagonal
    against: Tensor  # [num_tasks, num_tasks], symmetric: those that one raises and the other lowers
    mass: Tensor  # [num_tasks], sum of abs(expert - base)
    lesser: Tensor  # [], sum over entries of the mass of the direction that has less of it
    base_square: Tensor  # [], sum of the finite entries of the base, squared

    def __add__(self, other: Census) -> Census:
        """That of both tensors together."""
        return Census(*(getattr(self, of.name) + getattr(other, of.name) for of in fields(self)))


def census(base: Tensor, experts: Experts, *, thresholds: PerExpert | None = None) -> Census:
    """Counts changes, conflicts of sign and odd numbers of one tensor of several models.

    Reads every model once. The counts and sums are the same on every instruction set, thread count and device.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16.
        experts: List of num_tasks >= 1 tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        thresholds: Magnitudes from which a change counts as kept, 0 or greater, one or one per expert, such as those of
            `trim_thresholds`; None: nothing is kept.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.

    Source: the interference of signs is that of TIES-Merging (arXiv 2306.01708), section 3.
    """
    if base is None:
        raise TypeError("base must be a tensor, got None")
    _, experts = arguments.check_experts(base, experts)
    limits = None
    if thresholds is not None:
        values = arguments.per_expert("thresholds", thresholds, len(experts))
        for value in values:
            if not value >= 0:
                raise ValueError(f"thresholds must be 0 or greater, got {value}")
        limits = torch.tensor([values], dtype=torch.float64)
    counts, sums = _ops.census([base], experts, len(experts), limits)
    return _named(counts[0], sums[0], len(experts))


def _named(counts: Tensor, sums: Tensor, n: int) -> Census:
    """As csrc/cpu/census_kernel.h lays them out."""
    nonfinite, zeros, saturated, changed, kept, single, both, against = counts.split(
        [n + 1, n + 1, n + 1, n, n, 5, n * n, n * n]
    )
    both, against = (pairs.view(n, n) + pairs.view(n, n).T for pairs in (both, against))
    touched, conflicts, kept_by_any, kept_by_two, kept_conflicts = single
    return Census(
        nonfinite,
        zeros,
        saturated,
        changed,
        kept,
        touched,
        conflicts,
        kept_by_any,
        kept_by_two,
        kept_conflicts,
        both + changed.diag(),
        against,
        sums[:n],
        sums[n],
        sums[n + 1],
    )


@torch.library.register_fake("surgery_kernels::census")
def _(
    base: Sequence[Tensor], experts: Sequence[Tensor], num_tasks: int, thresholds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    n = num_tasks
    counts = experts[0].new_empty((len(base), 5 * n + 8 + 2 * n * n), dtype=torch.int64)
    return counts, experts[0].new_empty((len(base), n + 2), dtype=torch.float64)
