"""A masked merge on CUDA tensors: forward with the bits of the CPU; the mask is drawn anew wherever it is needed.

A program adds up a piece of the mask, in the order of the CPU; merging goes through smaller pieces.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.combine import LEAST_MEAN, MASK_STREAM, SHARPEST
from .addresses import BASE, CHUNK, EXPERTS, OUT, Scope, divide, load, store, upload
from .combine import checked_offsets
from .combine_pieces import fold, locate_piece, num_places, wide_from, words_from
from .exponential import exponential, exponential_f32, logarithm
from .sums import SUM_BLOCK, fold_lanes

BLOCK = 1024  # also of the order of the sums: kMaskLanes of the CPU
TILE = 4096  # entries of task vectors that the backward holds
FLOOR = tl.constexpr(LEAST_MEAN)
STREAM = tl.constexpr(MASK_STREAM)

# What a program reads of `numbers`, float64 and for the seed its bits.
SEED, SHARPNESS, STEEPNESS = (tl.constexpr(column) for column in range(3))


@triton.jit
def _draw(
    logits, numbers, block, place, begin, at, left, COMPUTE: tl.constexpr, WAY: tl.constexpr, BLOCK: tl.constexpr
):
    """The mask of BLOCK elements of a piece from `at` on, of which `left` are there."""
    lanes = tl.arange(0, BLOCK)
    x = tl.load(logits + begin + at + lanes, mask=lanes < left, other=0)
    if WAY != "sure":
        words = words_from(tl.load(numbers + SEED).to(tl.int64, bitcast=True), block, STREAM, place + at, BLOCK)
    if WAY == "half" or WAY == "one":
        if x.dtype == tl.float64:
            u = words.to(tl.float64) + 0.5
            other = (4294967296.0 - u) * exponential(0.0 - x)
        else:
            u = (words >> 9).to(tl.float32) + 0.5
            other = (8388608.0 - u) * exponential_f32(0.0 - x)
        if WAY == "half":
            u, other = u * u, other * other
        m = divide(u, u + other)
    else:
        noisy = x.to(tl.float64)
        if WAY == "any":
            share = words.to(tl.float64) + 0.5
            noisy = noisy + logarithm(share / (4294967296.0 - share))
        m = (1.0 / (1.0 + exponential(noisy * (0.0 - tl.load(numbers + SHARPNESS))))).to(COMPUTE)
    return m


@triton.jit
def _add_masks(
    logits, numbers, block_offsets, num_blocks, sums,
    COMPUTE: tl.constexpr, WAY: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of a piece of the mask."""
    block, place, begin, count = locate_piece(block_offsets, num_blocks, PIECE)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        m = _draw(logits, numbers, block, place, begin, at, count - at, COMPUTE, WAY, BLOCK)
        total += tl.where(tl.arange(0, BLOCK) < count - at, m.to(tl.float64), 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(fold_lanes(total[None, :], BLOCK)))


@triton.jit
def _mean_of(means, block):
    """At least FLOOR; NaN stays."""
    mean = tl.load(means + block)
    return tl.where(mean < FLOOR, FLOOR, mean)


@triton.jit
def _merge_from(
    row, logits, numbers, block, place, begin, first, last, num_tasks, coefficients, num_blocks, mean,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WAY: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements `first` to `last` of a piece."""
    lanes = tl.arange(0, BLOCK)
    for at in range(first, last, BLOCK):
        left = last - at
        m = _draw(logits, numbers, block, place, begin, at, left, COMPUTE, WAY, BLOCK)
        base = load(tl.load(row + BASE), begin + at, lanes, left, STORED, COMPUTE, WHOLE)
        sum = tl.zeros([BLOCK], COMPUTE)
        for t in tl.range(num_tasks, loop_unroll_factor=4):
            x = load(tl.load(row + EXPERTS + t), begin + at, lanes, left, STORED, COMPUTE, WHOLE)
            sum = sum + x * tl.load(coefficients + t * num_blocks + block)
        factor = divide(m, tl.zeros([BLOCK], COMPUTE) + mean)
        store(base + factor * sum, tl.load(row + OUT), begin + at, lanes, left, STORED, WHOLE)


@triton.jit
def _merge(
    row, logits, numbers, block_offsets, num_blocks, means, num_tasks, coefficients,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WAY: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, place, begin, count = locate_piece(block_offsets, num_blocks, PIECE)
    mean = _mean_of(means, block).to(COMPUTE)
    whole = tl.where(wide_from(row, begin), count // BLOCK * BLOCK, 0)
    _merge_from(
        row, logits, numbers, block, place, begin // 16 * 16, 0, whole, num_tasks, coefficients, num_blocks,
        mean, STORED, COMPUTE, WAY, True, BLOCK,
    )  # fmt: skip
    _merge_from(
        row, logits, numbers, block, place, begin, whole, count, num_tasks, coefficients, num_blocks, mean, STORED,
        COMPUTE, WAY, False, BLOCK,
    )  # fmt: skip


@triton.jit
def _pull(
    row, logits, numbers, block_offsets, num_blocks, means, num_tasks, coefficients, pull, sums, places,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WAY: tl.constexpr, PIECE: tl.constexpr, TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """pull = gradient * S, and the sums of a piece: pull * mask, and of every task vector gradient * mask / mean *
    task_vector.  # sums: [1 + num_tasks, places]"""
    block, place, begin, count = locate_piece(block_offsets, num_blocks, PIECE)
    mean = _mean_of(means, block).to(COMPUTE)
    lanes = tl.arange(0, BLOCK)
    tasks = tl.arange(0, TASKS)
    there = tasks < num_tasks
    known = tl.minimum(tasks, num_tasks - 1).to(tl.int64)  # what is beyond is the last again
    experts = tl.load(row + EXPERTS + known)[:, None]
    factors = tl.load(coefficients + known * num_blocks + block, mask=there, other=0)[:, None]
    of_mask = tl.zeros([BLOCK], COMPUTE)
    of_tasks = tl.zeros([TASKS, BLOCK], COMPUTE)
    for at in range(0, count, BLOCK):
        left = count - at
        m = _draw(logits, numbers, block, place, begin, at, left, COMPUTE, WAY, BLOCK)
        gradient = load(tl.load(row + BASE), begin + at, lanes, left, STORED, COMPUTE, False)
        x = load(experts, begin + at, lanes[None, :], left, STORED, COMPUTE, False)
        pulled = gradient * tl.sum(tl.where(there[:, None], x * factors, 0.0), axis=0)
        tl.store(pull + begin + at + lanes, pulled, mask=lanes < left)
        of_mask += tl.where(lanes < left, pulled * m, 0.0)
        of_tasks += x * (gradient * divide(m, tl.zeros([BLOCK], COMPUTE) + mean))[None, :]
    to = sums + tl.program_id(0)
    tl.store(to, tl.sum(of_mask).to(tl.float64))
    tl.store(to + (1 + known) * places, tl.sum(of_tasks, axis=1).to(tl.float64), mask=there)


@triton.jit
def _push(
    logits, numbers, block_offsets, num_blocks, means, of_masks, pull,
    COMPUTE: tl.constexpr, WAY: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place of pull: the gradient of the logits. of_masks: the sum of pull * mask over every block."""
    block, place, begin, count = locate_piece(block_offsets, num_blocks, PIECE)
    size = (tl.load(block_offsets + block + 1) - tl.load(block_offsets + block)).to(tl.float64)
    own = tl.load(means + block)
    # a mean that is not the mask's own does not move with it
    shift = tl.where(own < FLOOR, 0.0, tl.load(of_masks + block) / size / own).to(COMPUTE)
    mean = _mean_of(means, block).to(COMPUTE)
    alone = (size == 1) & (own >= FLOOR)  # scaled by 1 whatever its logit
    steepness = tl.where(alone, 0.0, tl.load(numbers + STEEPNESS)).to(COMPUTE)
    lanes = tl.arange(0, BLOCK)
    for at in range(0, count, BLOCK):
        left = count - at
        m = _draw(logits, numbers, block, place, begin, at, left, COMPUTE, WAY, BLOCK)
        to = pull + begin + at + lanes
        moved = divide(tl.load(to, mask=lanes < left, other=0) - shift, tl.zeros([BLOCK], COMPUTE) + mean)
        tl.store(to, moved * (m * (1.0 - m) * steepness), mask=lanes < left)


class _Arguments:
    """What forward and backward share, checked, and on the device."""

    def __init__(
        self, scope: Scope, coefficients: Tensor, block_offsets: Tensor, logits: Tensor, temperature: float,
        seed: int | None,
    ) -> None:  # fmt: skip
        self.block_offsets = checked_offsets(block_offsets, scope)
        self.num_blocks = len(self.block_offsets) - 1
        if coefficients.shape != (scope.num_tasks, self.num_blocks) or coefficients.device != scope.device:
            raise RuntimeError(
                f"coefficients must be [{scope.num_tasks}, {self.num_blocks}] on {scope.device}, got another shape or "
                "device"
            )
        if logits.shape != (scope.numel,) or logits.device != scope.device:
            raise RuntimeError(f"mask_logits must be [{scope.numel}] on {scope.device}, got another shape or device")
        for name, tensor in (("coefficients", coefficients), ("mask_logits", logits)):
            if tensor.dtype != scope.compute:
                raise RuntimeError(f"{name} must be in the compute type, got another dtype")
        if not 0 <= temperature < math.inf:
            raise RuntimeError(f"temperature must be finite and 0 or greater, got {temperature}")
        self.coefficients, self.logits = coefficients.contiguous(), logits.contiguous()
        sharpness, steepness = (1 / temperature, 1 / temperature) if temperature else (SHARPEST, 0.0)
        numbers = torch.tensor([0.0, sharpness, steepness], dtype=torch.float64)
        numbers.view(torch.int64)[0] = seed or 0
        self.numbers = upload(numbers, scope.device)
        self.way = "sure" if seed is None else {0.5: "half", 1.0: "one"}.get(temperature, "any")

    def places(self, scope: Scope, piece: int) -> int:
        return num_places(scope.numel, self.num_blocks, piece)


def combine_masked(
    base: Tensor,
    task_vectors: Sequence[Tensor],
    coefficients: Tensor,
    block_offsets: Tensor,
    mask_logits: Tensor,
    temperature: float,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    scope = Scope([base], task_vectors, len(task_vectors), [out])
    given = _Arguments(scope, coefficients, block_offsets, mask_logits, temperature, seed)
    (group,) = scope.groups
    compute = group.dtypes["COMPUTE"]
    places = given.places(scope, SUM_BLOCK)
    sums = torch.empty(1, places, dtype=torch.float64, device=scope.device)
    if places:
        _add_masks[(places,)](
            given.logits, given.numbers, given.block_offsets, given.num_blocks, sums, COMPUTE=compute, WAY=given.way,
            PIECE=SUM_BLOCK, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    means = fold(sums, given.block_offsets, SUM_BLOCK, mean=True)[0]
    if places:
        _merge[(given.places(scope, CHUNK),)](
            group.table, given.logits, given.numbers, given.block_offsets, given.num_blocks, means, scope.num_tasks,
            given.coefficients, **group.dtypes, WAY=given.way, PIECE=CHUNK, BLOCK=BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out, means


def combine_masked_backward(
    grad: Tensor,
    task_vectors: Sequence[Tensor],
    coefficients: Tensor,
    block_offsets: Tensor,
    mask_logits: Tensor,
    means: Tensor,
    temperature: float,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    scope = Scope([grad], task_vectors, len(task_vectors))
    given = _Arguments(scope, coefficients, block_offsets, mask_logits, temperature, seed)
    if means.shape != (given.num_blocks,) or means.dtype != torch.float64 or means.device != scope.device:
        raise RuntimeError(
            f"means must be float64 [{given.num_blocks}] on {scope.device}, got another dtype, shape or device"
        )
    means = means.contiguous()
    (group,) = scope.groups
    pull = torch.empty(scope.numel, dtype=scope.compute, device=scope.device)
    places, tasks = given.places(scope, CHUNK), triton.next_power_of_2(scope.num_tasks)
    sums = torch.empty(1 + scope.num_tasks, places, dtype=torch.float64, device=scope.device)
    if places:
        _pull[(places,)](
            group.table, given.logits, given.numbers, given.block_offsets, given.num_blocks, means, scope.num_tasks,
            given.coefficients, pull, sums, places, **group.dtypes, WAY=given.way, PIECE=CHUNK, TASKS=tasks,
            BLOCK=max(32, min(BLOCK, TILE // tasks)), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    folded = fold(sums, given.block_offsets, CHUNK)
    if places:
        _push[(places,)](
            given.logits, given.numbers, given.block_offsets, given.num_blocks, means, folded, pull,
            COMPUTE=group.dtypes["COMPUTE"], WAY=given.way, PIECE=CHUNK, BLOCK=BLOCK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return folded[1:].to(scope.compute), pull
