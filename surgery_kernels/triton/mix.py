"""base + lam * sum_t weights[t] * (expert_t - base) / divisor on CUDA tensors: one read, one rounding."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, EXPERTS, OUT, Scope, divide, load, locate, store
from .finite import FiniteCheck, is_finite

BLOCK = 1024


@triton.jit
def _merge(
    table, num_parts, columns, num_tasks, numbers, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CHECKED: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if CHECKED:  # noqa: SIM102  # there is no pointer to load from otherwise
        if tl.load(nonfinite) != 0:
            return
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        _merge_block(
            row, begin + at, BLOCK, num_tasks, numbers,
            STORED, COMPUTE, HAS_BASE, DROP, True, ALIGNED, BLOCK,
        )  # fmt: skip
    if whole < count:
        _merge_block(
            row, begin + whole, count - whole, num_tasks, numbers,
            STORED, COMPUTE, HAS_BASE, DROP, False, ALIGNED, BLOCK,
        )  # fmt: skip


@triton.jit
def _merge_block(
    row, at, left, num_tasks, numbers,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    base = tl.zeros([BLOCK], COMPUTE)
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, WHOLE, ALIGNED)
    sum = tl.zeros([BLOCK], COMPUTE)
    for t in tl.range(num_tasks, loop_unroll_factor=4):
        x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, COMPUTE, WHOLE, ALIGNED)
        if HAS_BASE:
            x = x - base
        if DROP:
            x = tl.where(is_finite(x), x, 0.0)
        sum = sum + x * tl.load(numbers + 2 + t).to(COMPUTE)
    merged = divide(sum, tl.load(numbers + 1).to(COMPUTE) + tl.zeros([BLOCK], COMPUTE)) * tl.load(numbers).to(COMPUTE)
    if HAS_BASE:
        merged = base + merged
    store(merged, tl.load(row + OUT), at, lanes, left, STORED, WHOLE, ALIGNED)


def linear_merge_out(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    weights: Sequence[float],
    lam: float = 1.0,
    divisor: float = 1.0,
    nonfinite: str = "error",
    names: Sequence[str] | None = None,
    *,
    out: Sequence[Tensor],
) -> None:
    scope = Scope(base, experts, len(weights), out, numbers=lambda dtype: [lam, divisor, *weights])
    finite = FiniteCheck(scope, nonfinite, names)
    finite.count()
    for group in scope.groups:
        _merge[(group.num_chunks,)](
            *group.place, scope.num_tasks, group.numbers, finite.found, **group.dtypes, HAS_BASE=scope.has_base,
            DROP=nonfinite == "drop", CHECKED=finite.wanted, ALIGNED=group.aligned, CHUNK=CHUNK, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    finite.look()
    scope.deliver()
