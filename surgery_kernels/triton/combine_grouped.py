"""A merge of blocks that are parted at random into groups, on CUDA tensors: forward with the bits of the CPU."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.combine import GROUPS_STREAM, MOST_GROUPS
from .addresses import BASE, CHUNK, EXPERTS, OUT, Scope, load, store, upload
from .combine import checked_offsets
from .combine_pieces import fold, locate_piece, num_places, wide_from, words_from

BLOCK = 1024
TILE = 4096  # products that the backward holds, by task and group
STREAM = tl.constexpr(GROUPS_STREAM)


@triton.jit
def _groups(seed, block, first, num_groups, COUNT: tl.constexpr):
    return words_from(tl.load(seed), block, STREAM, first, COUNT) * num_groups >> 32


@triton.jit
def _merge_from(
    row, seed, block, place, begin, first, last, num_tasks, num_groups, coefficients, num_blocks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements `first` to `last` of a piece."""
    lanes = tl.arange(0, BLOCK)
    for at in range(first, last, BLOCK):
        left = last - at
        group = _groups(seed, block, place + at, num_groups, BLOCK)
        base = load(tl.load(row + BASE), begin + at, lanes, left, STORED, COMPUTE, WHOLE)
        sum = tl.zeros([BLOCK], COMPUTE)
        for t in tl.range(num_tasks, loop_unroll_factor=4):
            x = load(tl.load(row + EXPERTS + t), begin + at, lanes, left, STORED, COMPUTE, WHOLE)
            sum = sum + x * tl.load(coefficients + (t * num_blocks + block) * num_groups + group)
        store(base + sum, tl.load(row + OUT), begin + at, lanes, left, STORED, WHOLE)


@triton.jit
def _merge(
    row, seed, block_offsets, num_blocks, num_tasks, num_groups, coefficients,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, place, begin, count = locate_piece(block_offsets, num_blocks, PIECE)
    whole = tl.where(wide_from(row, begin), count // BLOCK * BLOCK, 0)
    _merge_from(
        row, seed, block, place, begin // 16 * 16, 0, whole, num_tasks, num_groups, coefficients, num_blocks,
        STORED, COMPUTE, True, BLOCK,
    )  # fmt: skip
    _merge_from(
        row, seed, block, place, begin, whole, count, num_tasks, num_groups, coefficients, num_blocks, STORED, COMPUTE,
        False, BLOCK,
    )  # fmt: skip


@triton.jit
def _differentiate(
    row, seed, block_offsets, num_blocks, num_tasks, num_groups, sums, places,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, PIECE: tl.constexpr, TASKS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """<gradient, task_vectors[t]> over every group of a piece, for TASKS task vectors.

    sums: [num_tasks, num_groups, places]
    """
    block, place, begin, count = locate_piece(block_offsets, num_blocks, PIECE)
    lanes = tl.arange(0, BLOCK)
    tasks = tl.program_id(1) * TASKS + tl.arange(0, TASKS)
    known = tl.minimum(tasks, num_tasks - 1).to(tl.int64)  # what is beyond is the last again
    experts = tl.load(row + EXPERTS + known)[:, None]
    numbers = tl.arange(0, GROUPS)
    total = tl.zeros([TASKS, GROUPS, BLOCK], COMPUTE)
    for at in range(0, count, BLOCK):
        group = _groups(seed, block, place + at, num_groups, BLOCK)
        gradient = load(tl.load(row + BASE), begin + at, lanes[None, :], count - at, STORED, COMPUTE, False)
        product = gradient * load(experts, begin + at, lanes[None, :], count - at, STORED, COMPUTE, False)
        total += tl.where(group[None, None, :] == numbers[None, :, None], product[:, None, :], 0.0)
    to = sums + (known[:, None] * num_groups + numbers[None, :]) * places + tl.program_id(0)
    there = (tasks < num_tasks)[:, None] & (numbers < num_groups)[None, :]
    tl.store(to, tl.sum(total, axis=2).to(tl.float64), mask=there)


def combine_grouped(
    base: Tensor, task_vectors: Sequence[Tensor], coefficients: Tensor, block_offsets: Tensor, seed: int
) -> Tensor:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    scope = Scope([base], task_vectors, len(task_vectors), [out])
    block_offsets = checked_offsets(block_offsets, scope)
    num_blocks = len(block_offsets) - 1
    if (
        coefficients.dim() != 3
        or coefficients.shape[:2] != (scope.num_tasks, num_blocks)
        or coefficients.device != scope.device
    ):
        raise RuntimeError(
            f"coefficients must be [{scope.num_tasks}, {num_blocks}, groups] on {scope.device}, got another shape or "
            "device"
        )
    _check_num_groups(coefficients.shape[2])
    if coefficients.dtype != scope.compute:
        raise RuntimeError("coefficients must be in the compute type, got another dtype")
    (group,) = scope.groups
    places = num_places(scope.numel, num_blocks, CHUNK)
    if places:
        _merge[(places,)](
            group.table, upload(torch.tensor([seed]), scope.device), block_offsets, num_blocks, scope.num_tasks,
            coefficients.shape[2], coefficients.contiguous(), **group.dtypes, PIECE=CHUNK, BLOCK=BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def combine_grouped_backward(
    grad: Tensor, task_vectors: Sequence[Tensor], block_offsets: Tensor, num_groups: int, seed: int
) -> Tensor:
    scope = Scope([grad], task_vectors, len(task_vectors))
    block_offsets = checked_offsets(block_offsets, scope)
    _check_num_groups(num_groups)
    num_blocks, num_tasks = len(block_offsets) - 1, scope.num_tasks
    (group,) = scope.groups
    places = num_places(scope.numel, num_blocks, CHUNK)
    sums = torch.empty(num_tasks * num_groups, places, dtype=torch.float64, device=scope.device)
    groups = triton.next_power_of_2(num_groups)
    tasks = max(1, min(triton.next_power_of_2(num_tasks), TILE // (32 * groups)))
    if places:
        _differentiate[(places, triton.cdiv(num_tasks, tasks))](
            group.table, upload(torch.tensor([seed]), scope.device), block_offsets, num_blocks, num_tasks, num_groups,
            sums, places, **group.dtypes, PIECE=CHUNK, TASKS=tasks, GROUPS=groups,
            BLOCK=max(16, min(BLOCK, TILE // (tasks * groups))), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    folded = fold(sums, block_offsets, CHUNK).view(num_tasks, num_groups, num_blocks)
    return folded.movedim(1, 2).to(scope.compute).contiguous()


def _check_num_groups(num_groups: int) -> None:
    if not 1 <= num_groups <= MOST_GROUPS:
        raise RuntimeError(f"coefficients must be of 1 to {MOST_GROUPS} groups of every block, got {num_groups}")
