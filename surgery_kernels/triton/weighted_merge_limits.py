"""Exact order statistics of scores that lie in no tensor: rounds of counting them in ever smaller bins.

Bound: a round reads base and experts once; four rounds for float32 and narrower, eight for float64, with no look by the
host between them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, Scope, load, locate, upload, whole_blocks
from .weighted_merge_scores import change, constants_of, rate_of, score, sums_over_experts

BIN_BITS = 8
BLOCK = 512

# Keys that order like scores, those nearer to 0 than LEAST and NaN in the middle: csrc/cpu/weighted_merge_kernel.h.
MIDDLE, MIDDLE_WIDE = tl.constexpr(0x7F800000 // 2), tl.constexpr(0x7FF0000000000000 // 2)
LEAST, LEAST_WIDE = tl.constexpr(27 << 23), tl.constexpr(123 << 52)


@triton.jit
def _key_of(x):
    if x.dtype == tl.float64:
        bits, middle, least = x.to(tl.int64, bitcast=True), MIDDLE_WIDE, LEAST_WIDE
        above = (bits & 0x7FFFFFFFFFFFFFFF) - least
    else:
        bits, middle, least = x.to(tl.int32, bitcast=True), MIDDLE, LEAST
        above = (bits & 0x7FFFFFFF) - least
    above = tl.where((above > 0) & (above < middle), above, 0)
    return tl.where(bits < 0, middle - above, middle + above)


@triton.jit(do_not_specialize=["bits", "shift"])
def _count(
    table, num_parts, columns, num_tasks, numbers, rate, firsts, bits, shift, histogram, tops,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, POWER: tl.constexpr, TANH: tl.constexpr, HAS_BASE: tl.constexpr,
    INTER: tl.constexpr, DROP: tl.constexpr,
    BINS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys from `firsts` to 2^bits further, in bins of 2^shift, and the highest.  # histogram: [num_tasks, BINS]"""
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    whole = whole_blocks(row, count, BLOCK)
    for at in range(0, whole, BLOCK):
        _count_block(
            row, begin + at, BLOCK, num_tasks, numbers, rate, firsts, bits, shift, histogram, tops,
            STORED, COMPUTE, POWER, TANH, HAS_BASE, INTER, DROP, True, BINS, BLOCK,
        )  # fmt: skip
    for at in range(whole, count, BLOCK):
        _count_block(
            row, begin + at, count - at, num_tasks, numbers, rate, firsts, bits, shift, histogram, tops,
            STORED, COMPUTE, POWER, TANH, HAS_BASE, INTER, DROP, False, BINS, BLOCK,
        )  # fmt: skip


@triton.jit
def _count_block(
    row, at, left, num_tasks, numbers, rate, firsts, bits, shift, histogram, tops,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, POWER: tl.constexpr, TANH: tl.constexpr, HAS_BASE: tl.constexpr,
    INTER: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes, bins = tl.arange(0, BLOCK), tl.arange(0, BINS)
    base = tl.zeros([BLOCK], COMPUTE)
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, WHOLE)
    of_one = tl.load(rate).to(COMPUTE)
    sums = sums_over_experts(
        row, num_tasks, base, at, lanes, left, numbers, STORED, COMPUTE, TANH, INTER, DROP, WHOLE
    )  # fmt: skip
    for t in tl.range(num_tasks):
        x, _, s = change(row, t, base, at, lanes, left, numbers, STORED, COMPUTE, DROP, WHOLE)
        key = _key_of(score(x, s, sums, of_one, POWER, TANH, INTER))
        tl.atomic_max(tops + t, tl.max(tl.where(lanes < left, key, 0)), sem="relaxed")
        from_first = key - tl.load(firsts + t)
        here = (lanes < left) & (from_first >= 0) & ((from_first >> bits) == 0)
        counts = tl.histogram(tl.where(here, from_first >> shift, 0).to(tl.int32), BINS, mask=here)
        tl.atomic_add(histogram + t * BINS + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


def limits_of(scope: Scope, numbers: Tensor, ranks: Sequence[int], inter: str, drop: bool) -> Tensor:
    """Of every expert the score of its rank from the highest on, and the highest.  # [num_tasks, 2]"""
    dtype, bits = (torch.int64, 63) if scope.wide else (torch.int32, 31)
    firsts, tops = torch.zeros(2, scope.num_tasks, dtype=dtype, device=scope.device)
    left = upload(torch.tensor(ranks, dtype=torch.int64), scope.device)[:, None]
    rate = rate_of(scope)
    for upper in range(bits, 0, -BIN_BITS):
        shift = max(0, upper - BIN_BITS)
        histogram = torch.zeros(scope.num_tasks, 1 << BIN_BITS, dtype=torch.int64, device=scope.device)
        for group in scope.groups:
            _count[(group.num_chunks,)](
                *group.place, scope.num_tasks, numbers, rate, firsts, upper, shift, histogram, tops, **group.dtypes,
                **constants_of(scope, inter, drop), BINS=1 << BIN_BITS, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
        at_least = histogram.flip(1).cumsum(1).flip(1)  # keys in a bin or above
        chosen = (at_least[:, 1:] >= left).sum(dim=1, keepdim=True)
        left = left - (at_least - histogram).gather(1, chosen)
        firsts += (chosen[:, 0] << shift).to(dtype)
    return torch.stack((_score_of(firsts), _score_of(tops)), dim=1)


def _score_of(keys: Tensor) -> Tensor:
    middle, least, dtype = (MIDDLE_WIDE, LEAST_WIDE, torch.float64) if keys.dtype == torch.int64 else (
        MIDDLE, LEAST, torch.float32
    )  # fmt: skip
    above = (keys - middle.value).abs()
    magnitude = torch.where(above > 0, above + least.value, 0).view(dtype)
    return torch.where(keys < middle.value, -magnitude, magnitude)
