"""Weighted sums of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scope import Experts, load_scope, one_tensor_scope, per_expert, sum_experts


def linear_merge(
    base: Tensor | None,
    experts: Experts,
    *,
    weights: float | Sequence[float] = 1.0,
    lam: float = 1.0,
    divisor: float = 1.0,
    nonfinite: str = "error",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """base + lam * sum_t weights[t] * (expert_t - base) / divisor, rounded once; without a base, of the experts."""
    loaded = nonfinite if nonfinite == "error" else "propagate"
    (entry,) = load_scope(*one_tensor_scope(base, experts), loaded, compute_dtype)
    task_vectors = torch.stack([expert.reshape(-1) for expert in experts]).to(entry.base.dtype) - entry.base
    if nonfinite == "drop":
        task_vectors = torch.where(task_vectors.isfinite(), task_vectors, 0.0)
    column = entry.base.new_tensor(per_expert(weights, len(experts)))[:, None]
    scale, count = entry.base.new_tensor(lam), entry.base.new_tensor(divisor)
    return entry.store(entry.base + sum_experts(task_vectors * column) / count * scale)
