"""Sums over many elements in the one order that every backend takes."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, LANES = 32768, 32


def block_sum(terms: Tensor) -> Tensor:
    """Element i of a block adds to sum i % 32, one after the other; then these, and the blocks, are folded in halves.

    terms: [..., num_params] float64; 0 for none.
    """
    size = terms.shape[-1]
    length = min(BLOCK, max(1, -(-size // LANES)) * LANES)  # of a block; zeros behind the last element change nothing
    blocks = -(-size // length)
    padded = torch.nn.functional.pad(terms, (0, blocks * length - size))
    steps = padded.reshape(*terms.shape[:-1], blocks, length // LANES, LANES)
    sums = torch.zeros_like(steps[..., 0, :])
    for step in steps.unbind(dim=-2):
        sums = sums + step
    return fold_halves(fold_halves(sums))


def fold_halves(x: Tensor) -> Tensor:
    """x[j] += x[j + half] along the last dimension until one is left."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        low, high = x[..., :half], x[..., half:]
        x = torch.cat([low[..., : high.shape[-1]] + high, low[..., high.shape[-1] :]], dim=-1)
    return x[..., 0]
