"""Masks drawn by counter: Philox4x32-10 in plain integers, and the two rules of its probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .scope import Entry, Experts, load_scope, one_tensor_scope, per_expert
from .sums import block_sum

LOW = 0xFFFFFFFF


def philox(seed: int, tensor_id: int, task_id: int, count: int) -> Tensor:
    """The words of elements 0 to count - 1: element i takes word i % 4 of block i / 4.  # int64 [count]"""
    block = torch.arange(-(-count // 4))
    c = [block & LOW, block >> 32, torch.full_like(block, tensor_id), torch.full_like(block, task_id)]
    key = [seed & LOW, seed >> 32 & LOW]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # modulo 2**64
        c = [(second >> 32 & LOW) ^ c[1] ^ key[0], second & LOW, (first >> 32 & LOW) ^ c[3] ^ key[1], first & LOW]
        key = [(key[0] + 0x9E3779B9) & LOW, (key[1] + 0xBB67AE85) & LOW]
    return torch.stack(c, dim=1).reshape(-1)[:count]


def masks(base: Tensor | None, experts: Experts, **options: Any) -> tuple[Tensor, Tensor]:
    """What every expert keeps (bool [num_tasks, *shape]), and its sums.  # float64 [num_tasks, 3]"""
    kept, sums = scope_masks(*one_tensor_scope(base, experts), **options)
    return kept[0], sums[0]


def scope_masks(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float | Sequence[float],
    rule: str = "random",
    epsilon: float | Sequence[float] | None = None,
    seed: int = 0,
    tensor_ids: Sequence[int] | None = None,
    task_ids: Sequence[int] | None = None,
    nonfinite: str = "propagate",
) -> tuple[list[Tensor], Tensor]:
    num_tasks = len(experts)
    densities, epsilons = per_expert(density, num_tasks), per_expert(epsilon or 0.0, num_tasks)
    masks, sums = [], []
    for i, entry in enumerate(load_scope(bases, experts, nonfinite, None)):
        kept = []
        for t in range(num_tasks):
            words = philox(seed, tensor_ids[i] if tensor_ids else i, task_ids[t] if task_ids else t, entry.base.numel())
            if densities[t] >= 1:
                probability = torch.tensor(1.0, dtype=torch.float64)
            elif rule == "random":
                probability = torch.tensor(densities[t], dtype=torch.float64)
            else:
                probability = probability_by_rank(entry, t, densities[t], epsilons[t])
            kept.append(words < (probability * 2**32).long())
        masks.append(torch.stack(kept).reshape(num_tasks, *entry.shape))
        sums.append(sums_of(entry, torch.stack(kept)))
    return masks, torch.stack(sums)


def probability_by_rank(entry: Entry, t: int, density: float, epsilon: float) -> Tensor:
    """density - epsilon for the smallest magnitude of a row to density + epsilon for the largest.

    Rows run along the second dimension; a vector is one row.  # [num_params]
    """
    magnitudes = entry.task_vectors[t].abs().reshape((1, -1) if len(entry.shape) < 2 else entry.shape)
    size = magnitudes.shape[1]
    ranks = magnitudes.argsort(dim=1, stable=True).argsort(dim=1).double().reshape(-1)
    return (density - epsilon) + 2 * epsilon * ranks / (size - 1) if size > 1 else torch.full_like(ranks, density)


def sums_of(entry: Entry, kept: Tensor) -> Tensor:
    """How many are kept, the L1 norm of the task vector and that of its kept entries.  # [num_tasks, 3]"""
    norms = entry.task_vectors.double().abs()
    return torch.stack([kept.sum(dim=1).double(), block_sum(norms), block_sum(torch.where(kept, norms, 0.0))], dim=1)
