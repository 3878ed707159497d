"""A model from task vectors, one coefficient per block, or of every group within it; masked or not."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.combine import GROUPS_STREAM, LEAST_MEAN, MASK_STREAM, SHARPEST
from .masks import philox
from .scope import sum_experts
from .steps import exponential, exponential_f32, logarithm
from .sums import fold_halves

LANES = 1024


def combine(
    base: Tensor,
    task_vectors: Tensor,
    coefficients: Tensor,
    block_offsets: Tensor,
    *,
    mask_logits: Tensor | None = None,
    temperature: float = 0.5,
    seed: int | None = 0,
) -> Tensor:
    """base + mask / mean(mask) * sum_t coefficients[t, block] * task_vectors[t], rounded once.

    Differentiable in the coefficients. With [num_tasks, num_blocks, num_groups] of them the group of an element counts.
    """
    compute = torch.promote_types(base.dtype, torch.float32)
    of_param = coefficients.to(compute).repeat_interleave(block_offsets.diff(), dim=1)
    if coefficients.dim() == 3:
        groups = groups_of(block_offsets, coefficients.shape[2], seed or 0)
        of_param = of_param.gather(2, groups.expand(len(of_param), -1)[..., None])[..., 0]
    total = sum_experts(task_vectors.to(compute) * of_param)
    if mask_logits is not None:
        mask = mask_of(mask_logits.to(compute), block_offsets, temperature, seed)
        total = mask / means_of(mask, block_offsets).to(compute).repeat_interleave(block_offsets.diff()) * total
    return (base.to(compute) + total).to(base.dtype)


def mask_of(logits: Tensor, block_offsets: Tensor, temperature: float, seed: int | None) -> Tensor:
    """1 / (1 + exp(-(logits + log(u / (1 - u))) / temperature)), u drawn from (0, 1), in float64 and rounded.

    At temperature 1 and 1/2 u^s / (u^s + ((1 - u) exp(-logits))^s), s = 1 / temperature, in the logits' own dtype.
    """
    sharpness = 1 / temperature if temperature > 0 else SHARPEST
    if seed is None:
        return (1.0 / (1.0 + exponential(logits.double() * -sharpness))).to(logits.dtype)
    words = _words(block_offsets, MASK_STREAM, seed)
    u = words.double() + 0.5
    rest = 2.0**32 - u
    if sharpness not in (1, 2):
        return (1.0 / (1.0 + exponential((logits.double() + logarithm(u / rest)) * -sharpness))).to(logits.dtype)
    if logits.dtype == torch.float32:  # from the upper bits
        u = (words >> 9).float() + 0.5
        rest = 2.0**23 - u
    other = rest * (exponential_f32(-logits) if logits.dtype == torch.float32 else exponential(-logits))
    return u / (u + other) if sharpness == 1 else u * u / (u * u + other * other)


def means_of(mask: Tensor, block_offsets: Tensor) -> Tensor:
    """Of every block, at least 1e-12.  # float64 [num_blocks]"""
    blocks = mask.double().split(block_offsets.diff().tolist())
    means = [_sum(block) / max(1, block.numel()) for block in blocks]
    found = torch.stack(means) if means else mask.new_zeros(0, dtype=torch.float64)
    return torch.where(found < LEAST_MEAN, LEAST_MEAN, found)


def _sum(x: Tensor) -> Tensor:
    """Of pieces of 32768: element i of one adds to sum i % 1024; then these, and the pieces, are folded in halves."""
    pieces = []
    for piece in x.split(32768) if x.numel() else ():
        total = x.new_zeros(LANES)
        for row in piece.split(LANES):
            total = total + torch.nn.functional.pad(row, (0, LANES - row.numel()))
        pieces.append(fold_halves(total))
    return fold_halves(torch.stack(pieces)) if pieces else x.new_zeros(())


def groups_of(block_offsets: Tensor, num_groups: int, seed: int) -> Tensor:
    """Of every element.  # int64 [num_params]"""
    return _words(block_offsets, GROUPS_STREAM, seed) * num_groups >> 32


def _words(block_offsets: Tensor, stream: int, seed: int) -> Tensor:
    """One for every element, by its place in its block.  # int64 [num_params]"""
    sizes = block_offsets.diff().tolist()
    words = [philox(seed, block, stream, size) for block, size in enumerate(sizes)]
    return torch.cat(words) if words else torch.zeros(0, dtype=torch.int64)
