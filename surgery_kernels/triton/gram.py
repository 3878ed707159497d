"""All dot products on CUDA tensors: one read of up to eight experts, the additions in the order of the CPU.

A warp adds up one block of a vector, or one run of 32 columns, for all pairs of a tile of experts; torch folds the
blocks. Products and sums are float64, which GPUs for graphics have few units for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from ..ops.gram import AXES
from ..ops.mix import num_blocks_of
from .addresses import BASE, EXPERTS, TYPES, Scope, load
from .finite import FiniteCheck, is_finite
from .sums import LANES, SUM_BLOCK, fold_halves, fold_lanes, halves

RUN = 4_096  # elements of a column that are added one after the other: csrc/cpu/gram.cpp
TILE = 8  # experts whose pairs are in registers
HELD = 1 << 21  # sums that wait for others, 16 MiB
LOADS = 16  # of experts that are under way together


@triton.jit
def _vectors(
    row, base, first_task, num_tasks, at, lanes, left,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, ROUNDED: tl.constexpr, DROP: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A step of a tile of vectors; what is beyond num_tasks is the last again.  # [TILE, LANES]"""
    tasks = tl.minimum(first_task + tl.arange(0, TILE), num_tasks - 1)
    x = load(tl.load(row + EXPERTS + tasks)[:, None], at, lanes, left, STORED, COMPUTE, False)
    if HAS_BASE:
        x = x - base
    if ROUNDED:
        x = x.to(STORED).to(COMPUTE)
    if DROP:
        x = tl.where(is_finite(x), x, 0.0)
    return x.to(tl.float64)


@triton.jit(do_not_specialize=["first_piece", "units", "count", "size"])
def _add(
    row, num_tasks, first_piece, units, count, size, sums,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, ROUNDED: tl.constexpr, DROP: tl.constexpr,
    BY_COLUMN: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A piece of one vector of `size`, or of LANES columns out of `count`: a tile of pairs that are not below the
    diagonal.  # sums: [pieces, count, num_tasks, num_tasks]

    Bound: reads each expert once where there is one tile.
    """
    first_row, first_column = tl.program_id(1) // TILES * TILE, tl.program_id(1) % TILES * TILE
    if first_row > first_column:
        return
    place, unit = (tl.program_id(0) // units).to(tl.int64), (tl.program_id(0) % units).to(tl.int64)
    before = (first_piece + place) * PIECE
    length = tl.minimum(size - before, PIECE).to(tl.int32)
    lanes = tl.arange(0, LANES)[None, :]
    if BY_COLUMN:
        at, stride, steps = before * count + unit * LANES, count, length
    else:
        at, stride, steps = unit * size + before, LANES, tl.cdiv(length, LANES)
    total = tl.zeros([TILE, TILE, LANES], tl.float64)
    for step in tl.range(steps, loop_unroll_factor=UNROLL):
        if BY_COLUMN:
            left = count - unit * LANES
        else:
            left = length - step * LANES
        base = tl.zeros([1, LANES], COMPUTE)
        if HAS_BASE:
            base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, False)
        x = _vectors(
            row, base, first_row, num_tasks, at, lanes, left, STORED, COMPUTE, HAS_BASE, ROUNDED, DROP, TILE
        )  # fmt: skip
        y = x
        if TILES > 1:
            y = _vectors(
                row, base, first_column, num_tasks, at, lanes, left, STORED, COMPUTE, HAS_BASE, ROUNDED, DROP, TILE
            )  # fmt: skip
        total += x[:, None, :] * y[None, :, :]
        at += stride
    tasks = tl.arange(0, TILE)
    i, j = first_row + tasks[:, None], first_column + tasks[None, :]
    there = (i < num_tasks) & (j < num_tasks)
    if BY_COLUMN:
        column = unit * LANES + tl.arange(0, LANES)[None, None, :]
        to = sums + (place * count + column) * num_tasks * num_tasks
        stored = there[:, :, None] & (column < count)
        tl.store(to + (i * num_tasks + j)[:, :, None], total, mask=stored)
    else:
        to = sums + (place * count + unit) * num_tasks * num_tasks
        folded = tl.reshape(fold_lanes(tl.reshape(total, [TILE * TILE, LANES]), LANES), [TILE, TILE])
        tl.store(to + i * num_tasks + j, folded, mask=there)


def gram(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    num_tasks: int,
    axis: str = "tensor",
    rounded: bool = False,
    nonfinite: str = "error",
    names: Sequence[str] | None = None,
) -> Tensor:
    arguments.check_one_of("axis", axis, AXES)
    if num_tasks < 1:
        raise RuntimeError(f"num_tasks must be 1 or more, got {num_tasks}")
    scope = Scope(base, experts, num_tasks)
    finite = FiniteCheck(scope, nonfinite, names)
    rows = {group.dtype: iter(group.table) for group in scope.groups}
    firsts = experts[::num_tasks]
    counts = [1 if axis == "model" else num_blocks_of(first.shape, axis) for first in firsts]
    products = firsts[0].new_empty((sum(counts), num_tasks, num_tasks), dtype=torch.float64)
    for first, of_tensor in zip(firsts, products.split(counts), strict=True):
        row = next(rows[first.dtype])
        if len(of_tensor):
            _of_tensor(row, first, of_tensor, scope.has_base, axis, rounded, nonfinite == "drop")
    finite.suspect(products.diagonal(dim1=1, dim2=2))
    finite.look()
    return fold_halves(products.movedim(0, -1))[None] if axis == "model" else products


def _of_tensor(row: Tensor, first: Tensor, products: Tensor, has_base: bool, axis: str, rounded: bool, drop: bool):
    """Fills products, [num_vectors, num_tasks, num_tasks]; `row` has the tensor's addresses."""
    count, num_tasks = products.shape[:2]
    by_column = axis == "column" and first.dim() > 1
    size = first.numel() // count
    piece = RUN if by_column else SUM_BLOCK
    tile = min(TILE, triton.next_power_of_2(num_tasks))
    tiles = triton.cdiv(num_tasks, tile)
    units = triton.cdiv(count, LANES) if by_column else count
    wide = first.dtype == torch.float64
    loads = LOADS // 2 if by_column else LOADS  # the sums of columns are stored to addresses of their own

    def add(first_piece: int, sums: Tensor) -> Tensor:
        _add[(len(sums) * units, tiles * tiles)](
            row, num_tasks, first_piece, units, count, size, sums,
            STORED=TYPES[first.dtype], COMPUTE=tl.float64 if wide else tl.float32, HAS_BASE=has_base, ROUNDED=rounded,
            DROP=drop, BY_COLUMN=by_column, PIECE=piece, TILE=tile, TILES=tiles, UNROLL=loads // tile, LANES=LANES,
            num_warps=1, enable_fp_fusion=not wide,  # products of float32 are exact
        )  # fmt: skip
        return sums

    lengths = halves(triton.cdiv(size, piece) or 1)
    if len(lengths) == 1:
        add(0, products[None])
    else:
        after = next(i for i, n in enumerate(lengths) if n == 1 or n * products.numel() <= HELD)
        held = _places(
            lambda i, j: add(i, products.new_empty((j - i, *products.shape))), lengths, 0, lengths[after], after
        )
        products.copy_(fold_halves(held.movedim(0, -1)))
    if tiles > 1:
        i, j = torch.triu_indices(num_tasks, num_tasks, 1, device=products.device)
        products[:, j, i] = products[:, i, j]


def _places(add: Callable[[int, int], Tensor], lengths: Sequence[int], first: int, last: int, after: int) -> Tensor:
    """What places from `first` to `last` hold after some rounds of halving; add(i, j): what they held before.

    So that a long list need not be in memory at once.
    """
    if after == 0:
        return add(first, last)
    sums = _places(add, lengths, first, last, after - 1)
    first, last = first + lengths[after], min(last + lengths[after], lengths[after - 1])
    if first < last:
        sums[: last - first] += _places(add, lengths, first, last, after - 1)
    return sums
