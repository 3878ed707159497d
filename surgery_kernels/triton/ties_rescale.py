"""rescale: the L1 norms of task vectors before and after the trim, and the factors that give them back."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, EXPERTS, FIRST_CHUNK, NUMEL, OFFSET, Group, Scope, divide, is_whole, load, locate
from .finite import key_of, task_vector
from .ties_block import is_above, limits_of
from .ties_keep import narrowed

SUMS_AT_ONCE = 1024  # chunks of a tensor whose norms are added up together


@triton.jit
def _norms(
    table, num_parts, columns, num_tasks, limits, keep, norms, group_chunks,
    KEEP: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """L1 norms of a chunk of every task vector, before and after the trim.  # norms: [2, num_tasks, group_chunks]"""
    part, row, begin, count = locate(table, num_parts, columns, CHUNK)
    flat = tl.load(row + OFFSET) + begin
    norms += tl.program_id(0)
    if is_whole(row, count, CHUNK):
        _norms_of_chunk(
            row, part, begin, count, flat, num_tasks, limits, keep, norms, group_chunks,
            KEEP, STORED, COMPUTE, HAS_BASE, DROP, True, CHUNK,
        )  # fmt: skip
    else:
        _norms_of_chunk(
            row, part, begin, count, flat, num_tasks, limits, keep, norms, group_chunks,
            KEEP, STORED, COMPUTE, HAS_BASE, DROP, False, CHUNK,
        )  # fmt: skip


@triton.jit
def _norms_of_chunk(
    row, part, begin, count, flat, num_tasks, limits, keep, norms, group_chunks,
    KEEP: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)
    base = tl.zeros([CHUNK], STORED)
    if HAS_BASE:
        base = load(tl.load(row + BASE), begin, lanes, count, STORED, STORED, WHOLE)
    for t in range(num_tasks):
        x = load(tl.load(row + EXPERTS + t), begin, lanes, count, STORED, STORED, WHOLE)
        tau = task_vector(x, base, HAS_BASE, DROP).to(COMPUTE)
        kept = is_above(tau, limits_of(limits, t, flat, lanes, COMPUTE, True, CHUNK))
        if KEEP != 0:
            kept = narrowed(
                kept, key_of(tau), keep, part, num_tasks, t, begin, flat, lanes, count, COMPUTE, KEEP, WHOLE, CHUNK
            )
        magnitude = tl.abs(tau).to(tl.float64)
        tl.store(norms + t * group_chunks, tl.sum(magnitude))
        tl.store(norms + (num_tasks + t) * group_chunks, tl.sum(tl.where(kept, magnitude, 0.0)))


@triton.jit
def _sum_of_chunks(norms, first, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        lanes = at + tl.arange(0, BLOCK)
        total += tl.load(norms + first + lanes, mask=lanes < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _rescale(
    table, columns, num_tasks, norms, group_chunks, rescales,
    ROUNDED: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The factor that gives a trimmed task vector of one tensor its norm back.  # rescales: [num_parts, num_tasks]"""
    part, t = tl.program_id(0), tl.program_id(1)
    row = table + part.to(tl.int64) * columns
    first, count = tl.load(row + FIRST_CHUNK), (tl.load(row + NUMEL) + CHUNK - 1) // CHUNK
    norm_before = _sum_of_chunks(norms + t * group_chunks, first, count, BLOCK)
    norm_after = _sum_of_chunks(norms + (num_tasks + t) * group_chunks, first, count, BLOCK)
    before, after = norm_before.to(COMPUTE).to(ROUNDED).to(COMPUTE), norm_after.to(COMPUTE).to(ROUNDED).to(COMPUTE)
    small = tl.full([], 1e-7, tl.float64).to(COMPUTE)
    # A norm past the dtype's range would make the ratio NaN; the norms themselves are fine.
    infinite = (before == float("inf")) | (after == float("inf"))
    ratio = tl.where(infinite, (norm_before / norm_after).to(COMPUTE), divide(before, after))
    factor = tl.where((before < small) | (after < small), 1.0, ratio.to(ROUNDED).to(COMPUTE))
    tl.store(rescales + part * num_tasks + t, factor)


def rescales_of(
    scope: Scope, group: Group, limits: Tensor, nonfinite: str, keep: Tensor | None, flags: int, rounded: tl.dtype
) -> Tensor:
    """Of every tensor of a group and every expert.  # [num_parts, num_tasks]"""
    norms = torch.empty(2 * scope.num_tasks * group.num_chunks, dtype=torch.float64, device=scope.device)
    rescales = torch.empty(len(group.table), scope.num_tasks, dtype=scope.compute, device=scope.device)
    _norms[(group.num_chunks,)](
        *group.place, scope.num_tasks, limits, keep, norms, group.num_chunks, KEEP=flags, **group.dtypes,
        HAS_BASE=scope.has_base, DROP=nonfinite == "drop", CHUNK=CHUNK, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
    _rescale[(len(group.table), scope.num_tasks)](
        group.table, group.table.shape[1], scope.num_tasks, norms, group.num_chunks, rescales, ROUNDED=rounded,
        COMPUTE=group.dtypes["COMPUTE"], CHUNK=CHUNK, BLOCK=SUMS_AT_ONCE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return rescales
