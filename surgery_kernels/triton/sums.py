"""The order of sums over many elements, csrc/cpu/block_sums.h, for kernels and for what torch adds up behind them."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SUM_BLOCK, LANES = 32768, 32


@triton.jit
def fold_lanes(x, LANES: tl.constexpr):
    """Lane j += lane j + half until one is left: sums of two, whose order is no matter.  # [n, LANES] -> [n]"""
    half: tl.constexpr = LANES // 2
    x = tl.sum(tl.reshape(x, [x.shape[0], 2, half]), axis=1)
    if half > 1:
        return fold_lanes(x, half)
    return tl.sum(x, axis=1)


def halves(length: int) -> list[int]:
    """How long a list is that is folded in halves, from the beginning on."""
    lengths = [length]
    while lengths[-1] > 1:
        lengths.append((lengths[-1] + 1) // 2)
    return lengths


def fold_halves(x: Tensor) -> Tensor:
    """x[j] += x[j + half] along the last dimension until one is left; 0 of none."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    x = x.clone()
    for before, half in zip(halves(x.shape[-1]), halves(x.shape[-1])[1:], strict=False):
        x[..., : before - half] += x[..., half:before]
    return x[..., 0]
