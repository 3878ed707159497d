"""Counts and sums over task vectors on CUDA tensors: those of the CPU, in its order.

Three kernels over the blocks of a tensor: one of each model alone, one of each pair of experts, one of all together.
Each reads what it needs again, which the second-level cache has: an inspection waits for the disk, not for them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, EXPERTS, NUMEL, Group, Scope, load, part_of, upload
from .finite import task_vector
from .sums import LANES, SUM_BLOCK, fold_halves, fold_lanes

FIRST_BLOCK = tl.constexpr(0)
COLUMNS = tl.constexpr(1)


@triton.jit
def _block(table, num_parts, columns, tensors, SUM_BLOCK: tl.constexpr):
    """The tensor of a block: its number, its row, where the block begins in it and how many elements it has."""
    block = tl.program_id(0)
    part = part_of(tensors, num_parts, COLUMNS, block, FIRST_BLOCK).to(tl.int64)
    row = table + part * columns
    begin = (block - tl.load(tensors + part)) * SUM_BLOCK
    return part, row, begin, tl.minimum(tl.load(row + NUMEL) - begin, SUM_BLOCK).to(tl.int32)


@triton.jit
def _sum_lanes(x, LANES: tl.constexpr):
    return tl.sum(fold_lanes(x[None, :], LANES))


@triton.jit
def _of_models(
    table, num_parts, columns, tensors, thresholds, num_tasks, largest, counts, sums, num_blocks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, SUM_BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of model m, the base first.  # counts: [5, num_tasks + 1, num_blocks], sums: [num_tasks + 1, num_blocks]"""
    part, row, begin, count = _block(table, num_parts, columns, tensors, SUM_BLOCK)
    model = tl.program_id(1)
    base_address = tl.load(row + BASE)
    address = base_address
    limit = tl.full([], float("inf"), tl.float64)
    if model > 0:
        address = tl.load(row + EXPERTS + model - 1)
        limit = tl.load(thresholds + part * num_tasks + model - 1)
    limit = limit.to(COMPUTE)
    lanes = tl.arange(0, LANES)
    nonfinite = tl.zeros([LANES], tl.int32)
    zeros = tl.zeros([LANES], tl.int32)
    saturated = tl.zeros([LANES], tl.int32)
    changed = tl.zeros([LANES], tl.int32)
    kept = tl.zeros([LANES], tl.int32)
    total = tl.zeros([LANES], tl.float64)
    edge = tl.load(largest).to(COMPUTE)
    for at in tl.range(0, count, LANES, loop_unroll_factor=4):
        there = lanes < count - at
        x = load(address, begin + at, lanes, count - at, STORED, COMPUTE, False)
        base = load(base_address, begin + at, lanes, count - at, STORED, COMPUTE, False)
        finite = tl.abs(x) < float("inf")
        nonfinite += (there & (finite == 0)).to(tl.int32)
        zeros += (there & (x == 0)).to(tl.int32)
        saturated += (there & (tl.abs(x) == edge)).to(tl.int32)
        change = tl.abs(task_vector(x, base, True, True))
        changed += (change > 0).to(tl.int32)
        kept += ((change >= limit) & (change > 0)).to(tl.int32)
        own = tl.where(finite, x, 0.0).to(tl.float64)
        total += tl.where(model > 0, change.to(tl.float64), own * own)
    to = counts + model * num_blocks + tl.program_id(0)
    step = (num_tasks + 1).to(tl.int64) * num_blocks
    tl.store(to, tl.sum(nonfinite))
    tl.store(to + step, tl.sum(zeros))
    tl.store(to + 2 * step, tl.sum(saturated))
    tl.store(to + 3 * step, tl.sum(changed))
    tl.store(to + 4 * step, tl.sum(kept))
    tl.store(sums + model * num_blocks + tl.program_id(0), _sum_lanes(total, LANES))


@triton.jit
def _of_pairs(
    table, num_parts, columns, tensors, num_tasks, counts, num_blocks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, SUM_BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What both of a pair change, and what in two directions.  # counts: [2, num_tasks, num_tasks, num_blocks]"""
    part, row, begin, count = _block(table, num_parts, columns, tensors, SUM_BLOCK)
    i, j = tl.program_id(1), tl.program_id(2)
    lanes = tl.arange(0, STEP)
    both = tl.zeros([STEP], tl.int32)
    against = tl.zeros([STEP], tl.int32)
    if i < j:
        for at in range(0, count, STEP):
            base = load(tl.load(row + BASE), begin + at, lanes, count - at, STORED, COMPUTE, False)
            x = load(tl.load(row + EXPERTS + i), begin + at, lanes, count - at, STORED, COMPUTE, False)
            y = load(tl.load(row + EXPERTS + j), begin + at, lanes, count - at, STORED, COMPUTE, False)
            x = task_vector(x, base, True, True)
            y = task_vector(y, base, True, True)
            both += ((x != 0) & (y != 0)).to(tl.int32)
            against += (((x > 0) & (y < 0)) | ((x < 0) & (y > 0))).to(tl.int32)
    to = counts + (i * num_tasks + j) * num_blocks + tl.program_id(0)
    tl.store(to, tl.sum(both))
    tl.store(to + num_tasks.to(tl.int64) * num_tasks * num_blocks, tl.sum(against))


@triton.jit
def _of_all(
    table, num_parts, columns, tensors, thresholds, num_tasks, counts, sums, num_blocks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, SUM_BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What experts do to one another.  # counts: [5, num_blocks], sums: [num_blocks]"""
    part, row, begin, count = _block(table, num_parts, columns, tensors, SUM_BLOCK)
    lanes = tl.arange(0, LANES)
    touched = tl.zeros([LANES], tl.int32)
    conflicts = tl.zeros([LANES], tl.int32)
    kept_by_any = tl.zeros([LANES], tl.int32)
    kept_by_two = tl.zeros([LANES], tl.int32)
    kept_conflicts = tl.zeros([LANES], tl.int32)
    lesser = tl.zeros([LANES], tl.float64)
    for at in range(0, count, LANES):
        base = load(tl.load(row + BASE), begin + at, lanes, count - at, STORED, COMPUTE, False)
        upwards = tl.zeros([LANES], COMPUTE)
        downwards = tl.zeros([LANES], COMPUTE)
        up = tl.zeros([LANES], tl.int32)
        down = tl.zeros([LANES], tl.int32)
        kept_up = tl.zeros([LANES], tl.int32)
        kept_down = tl.zeros([LANES], tl.int32)
        for t in range(num_tasks):
            x = load(tl.load(row + EXPERTS + t), begin + at, lanes, count - at, STORED, COMPUTE, False)
            x = task_vector(x, base, True, True)
            limit = tl.load(thresholds + part * num_tasks + t).to(COMPUTE)
            upwards += tl.where(x > 0, x, 0.0)
            downwards += tl.where(x < 0, -x, 0.0)
            up += (x > 0).to(tl.int32)
            down += (x < 0).to(tl.int32)
            kept_up += ((x > 0) & (x >= limit)).to(tl.int32)
            kept_down += ((x < 0) & (-x >= limit)).to(tl.int32)
        lesser += tl.where(upwards > downwards, downwards, upwards).to(tl.float64)
        touched += (up + down > 0).to(tl.int32)
        conflicts += ((up > 0) & (down > 0)).to(tl.int32)
        kept_by_any += (kept_up + kept_down > 0).to(tl.int32)
        kept_by_two += (kept_up + kept_down > 1).to(tl.int32)
        kept_conflicts += ((kept_up > 0) & (kept_down > 0)).to(tl.int32)
    to = counts + tl.program_id(0)
    tl.store(to, tl.sum(touched))
    tl.store(to + num_blocks, tl.sum(conflicts))
    tl.store(to + 2 * num_blocks, tl.sum(kept_by_any))
    tl.store(to + 3 * num_blocks, tl.sum(kept_by_two))
    tl.store(to + 4 * num_blocks, tl.sum(kept_conflicts))
    tl.store(sums + tl.program_id(0), _sum_lanes(lesser, LANES))


def census(
    base: Sequence[Tensor], experts: Sequence[Tensor], num_tasks: int, thresholds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if num_tasks < 1:
        raise RuntimeError(f"num_tasks must be 1 or more, got {num_tasks}")
    if not base:
        raise RuntimeError("base must be one tensor for every merged tensor, got none")
    scope = Scope(base, experts, num_tasks)
    n, firsts = num_tasks, experts[::num_tasks]
    if thresholds is None:
        limits = torch.full((len(firsts), n), float("inf"), dtype=torch.float64)
    else:
        if thresholds.dtype != torch.float64 or thresholds.numel() != len(firsts) * n or not thresholds.is_contiguous():
            raise RuntimeError("thresholds must be contiguous float64 [tensors, num_tasks]")
        limits = thresholds.cpu().reshape(len(firsts), n)
        if not bool((limits >= 0).all()):
            wrong = limits[~(limits >= 0)][0].item()
            raise RuntimeError(f"thresholds must be 0 or greater, got {wrong:g}")
    counts = torch.zeros(len(firsts), 5 * n + 8 + 2 * n * n, dtype=torch.int64, device=scope.device)
    sums = torch.zeros(len(firsts), n + 2, dtype=torch.float64, device=scope.device)
    for group in scope.groups:
        if group.num_chunks:
            parts = scope.parts_of(group)
            _count(scope, group, parts, [firsts[part].numel() for part in parts], limits[parts], counts, sums)
    return counts, sums


def _count(
    scope: Scope, group: Group, parts: Sequence[int], sizes: Sequence[int], limits: Tensor, counts: Tensor, sums: Tensor
) -> None:
    """Fills the rows of the tensors of one dtype."""
    n, device = scope.num_tasks, scope.device
    blocks = [-(-size // SUM_BLOCK) for size in sizes]
    before = [sum(blocks[:i]) for i in range(len(blocks))]
    num_blocks = sum(blocks)
    tensors = upload(torch.tensor(before, dtype=torch.int64), device)
    thresholds = upload(limits.contiguous().view(torch.int64), device).view(torch.float64)
    edge = torch.tensor([torch.finfo(group.dtype).max], dtype=torch.float64).view(torch.int64)
    largest = upload(edge, device).view(torch.float64)

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, num_blocks, dtype=torch.int32, device=device)

    of_models, of_pairs, of_all = ints(5, n + 1), ints(2, n, n), ints(5)
    model_sums = torch.empty(n + 1, num_blocks, dtype=torch.float64, device=device)
    lesser = torch.empty(num_blocks, dtype=torch.float64, device=device)
    options = {**group.dtypes, "SUM_BLOCK": SUM_BLOCK, "enable_fp_fusion": False}
    _of_models[(num_blocks, n + 1)](
        *group.place, tensors, thresholds, n, largest, of_models, model_sums, num_blocks,
        **options, LANES=LANES, num_warps=1,
    )  # fmt: skip
    _of_pairs[(num_blocks, n, n)](
        *group.place, tensors, n, of_pairs, num_blocks, **options, STEP=1024, num_warps=4
    )  # fmt: skip
    _of_all[(num_blocks,)](
        *group.place, tensors, thresholds, n, of_all, lesser, num_blocks, **options, LANES=LANES, num_warps=1
    )  # fmt: skip
    for part, first, count in zip(parts, before, blocks, strict=True):
        own = slice(first, first + count)
        models = of_models[..., own].sum(-1)  # [5, n + 1]
        found = [
            *models[:3],
            models[3, 1:],
            models[4, 1:],
            of_all[:, own].sum(-1),
            of_pairs[..., own].sum(-1).flatten(),
        ]
        counts[part] = torch.cat(found)
        of_part = fold_halves(model_sums[:, own])
        sums[part] = torch.cat([of_part[1:], fold_halves(lesser[own])[None], of_part[:1]])
