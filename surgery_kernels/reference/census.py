"""Counts and sums over task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scope import Experts
from .sums import block_sum


def census(base: Tensor, experts: Experts, thresholds: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The fields of `surgery_kernels.ops.census.Census` by name."""
    compute = torch.promote_types(base.dtype, torch.float32)
    models = torch.stack([base, *experts]).reshape(len(experts) + 1, -1).to(compute)  # [num_tasks + 1, num_params]
    changes = models[1:] - models[0]
    changes = torch.where(changes.isfinite(), changes, 0.0)
    up, down = changes > 0, changes < 0
    moved = up | down
    kept = torch.zeros_like(up)
    if thresholds is not None:
        kept = (changes.abs() >= torch.tensor(thresholds).to(compute)[:, None]) & moved
    upwards, downwards = torch.zeros_like(models[0]), torch.zeros_like(models[0])
    for change in changes:  # in the compute type, expert after expert
        upwards = upwards + change.clamp_min(0)
        downwards = downwards + (-change).clamp_min(0)
    finite = torch.where(models[0].isfinite(), models[0], 0.0).double()
    pairs = [(moved, moved), (up, down), (down, up)]
    both, raised, lowered = ((x[:, None] & y[None]).sum(-1) for x, y in pairs)
    return {
        "nonfinite": (~models.isfinite()).sum(-1),
        "zeros": (models == 0).sum(-1),
        "saturated": (models.abs() == torch.finfo(base.dtype).max).sum(-1),
        "changed": moved.sum(-1),
        "kept": kept.sum(-1),
        "touched": moved.any(0).sum(),
        "conflicts": (up.any(0) & down.any(0)).sum(),
        "kept_by_any": kept.any(0).sum(),
        "kept_by_two": (kept.sum(0) >= 2).sum(),
        "kept_conflicts": ((kept & up).any(0) & (kept & down).any(0)).sum(),
        "both": both,
        "against": raised + lowered,
        "mass": block_sum(changes.abs().double()),
        "lesser": block_sum(torch.where(upwards > downwards, downwards, upwards).double()),
        "base_square": block_sum(finite * finite),
    }
