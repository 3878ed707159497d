"""A scope as every oracle loads it: tensors that share their decisions, flat, in the compute type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Experts = Sequence[Tensor] | Tensor


@dataclass
class Entry:
    """One tensor of the scope, flat, in the compute type."""

    shape: torch.Size
    dtype: torch.dtype  # of the result
    base: Tensor  # [num_params]
    task_vectors: Tensor  # [num_tasks, num_params], rounded to the stored dtype
    differences: Tensor  # [num_tasks, num_params], not rounded
    trimmed: Tensor  # [num_tasks, num_params], zero where not kept; `trim` sets it

    def round(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)

    def store(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(x.shape[:-1] + self.shape)


def one_tensor_scope(base: Tensor | None, experts: Experts) -> tuple[list[Tensor] | None, list[list[Tensor]]]:
    return None if base is None else [base], [[expert] for expert in experts]


def load_scope(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    nonfinite: str,
    compute_dtype: torch.dtype | None,
) -> list[Entry]:
    scope = []
    for i, first in enumerate(experts[0]):
        stored = first.dtype
        compute = compute_dtype or (torch.float64 if stored == torch.float64 else torch.float32)
        flat = torch.stack([expert[i].reshape(-1) for expert in experts]).to(compute)
        base = torch.zeros_like(flat[0]) if bases is None else bases[i].reshape(-1).to(compute)
        dtype = compute_dtype or stored
        differences = flat - base
        task_vectors = differences.to(dtype).to(compute)
        if nonfinite == "drop":
            task_vectors = torch.where(task_vectors.isfinite(), task_vectors, 0.0)
        scope.append(Entry(first.shape, dtype, base, task_vectors, differences, trimmed=task_vectors))
    if nonfinite == "error":
        for t in range(len(experts)):
            count = sum(int((~entry.task_vectors[t].isfinite()).sum()) for entry in scope)
            if count:
                raise RuntimeError(f"experts[{t}] must be finite, got {count} NaN or infinite values")
    return scope


def scope_keys(scope: Sequence[Entry]) -> Tensor:
    """Magnitudes of the whole scope in the widest compute type present.  # [num_tasks, num_params]"""
    widest = torch.float64 if any(entry.base.dtype == torch.float64 for entry in scope) else torch.float32
    return torch.cat([entry.task_vectors.abs().to(widest) for entry in scope], dim=1)


def sum_experts(x: Tensor) -> Tensor:
    """The sum over experts in their order: torch.sum(dim=0) takes another order from five experts on."""
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return total


def sign_of(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


def per_expert(value: float | Sequence[float], num_tasks: int) -> list[float]:
    return [float(value)] * num_tasks if isinstance(value, (int, float)) else [float(v) for v in value]
