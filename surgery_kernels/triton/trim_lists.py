"""The first read of trim where keys are many and ties few: it lists the keys in every expert's range, a small share.

Whatever the range looks like, the rounds behind it read the lists alone. Where a list is too short for its keys, or the
threshold lies outside the range, they read the tensors.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, Scope, is_aligned, load
from .finite import FiniteCheck
from .trim_rounds import (
    ABOVE,
    BIN_BITS,
    FIELDS,
    KEEP,
    LANES,
    LARGEST,
    LAST,
    LISTED,
    PIECE,
    SHIFT,
    THRESHOLD,
    above_range,
    below_range,
    keys_of,
    minus_if_negative,
    piece_of,
    pieces_of,
    shift_of,
    sum_of,
    tell_nonfinite,
)

SHARE = 16  # a list holds this part of the scope; independent keys need half of that


@triton.jit
def _gather(
    table, num_parts, columns, num_tasks, state, lists, capacity, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CHECKED: tl.constexpr,
    CHUNK: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Lists the keys of this piece that lie in the range of an open expert, and counts those above.

    Bound: reads each expert once.
    """
    row, at, left = piece_of(table, num_parts, columns, tl.program_id(0), CHUNK, PIECE)
    if (left >= PIECE) & is_aligned(row):
        _gather_piece(
            row, at, left, num_tasks, state, lists, capacity, nonfinite,
            STORED, COMPUTE, HAS_BASE, DROP, CHECKED, True, PIECE, LANES,
        )  # fmt: skip
    elif left > 0:
        _gather_piece(
            row, at, left, num_tasks, state, lists, capacity, nonfinite,
            STORED, COMPUTE, HAS_BASE, DROP, CHECKED, False, PIECE, LANES,
        )  # fmt: skip


@triton.jit
def _gather_piece(
    row, at, left, num_tasks, state, lists, capacity, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CHECKED: tl.constexpr,
    WHOLE: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    base = tl.zeros([PIECE], STORED)
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, tl.arange(0, PIECE), left, STORED, STORED, WHOLE)
    for t in range(num_tasks):
        expert = state + t * FIELDS
        is_listed = tl.load(expert + LISTED) >= 0
        if is_listed | CHECKED:
            key = keys_of(row, t, base, at, left, STORED, COMPUTE, HAS_BASE, DROP, WHOLE, PIECE, LANES)
            if is_listed:
                _list_keys(key, expert, lists, capacity, LANES)
            if CHECKED:
                tell_nonfinite(key, nonfinite)
        lists += capacity


@triton.jit
def _list_keys(key, expert, list, capacity, LANES: tl.constexpr):
    """Behind what others have listed, in any order.  # key: [n, LANES]"""
    first, last = tl.load(expert + THRESHOLD).to(key.dtype), tl.load(expert + LAST).to(key.dtype)
    outside = (key - first) | (last - key)  # negative where it is
    rows: tl.constexpr = key.shape[0]
    skipped = tl.cumsum(minus_if_negative(outside), axis=0)  # by a lane so far
    of_lane = tl.sum(minus_if_negative(outside), axis=0)
    first_of_lane = tl.arange(0, LANES) * rows + tl.cumsum(of_lane, axis=0) - of_lane
    count = rows * LANES + tl.sum(of_lane, axis=0)
    above = sum_of(minus_if_negative(key - first)) - tl.sum(of_lane, axis=0)
    tl.atomic_add(expert + ABOVE, above.to(tl.int64), sem="relaxed")
    begin = tl.atomic_add(expert + LISTED, count.to(tl.int64), sem="relaxed")
    if begin + count <= capacity:
        place = list + begin + first_of_lane[None, :] + skipped + tl.arange(0, rows)[:, None]
        tl.store(place, key, mask=outside >= 0)


@triton.jit
def _take_lists(state, capacity, LARGEST: tl.constexpr, BINS: tl.constexpr):
    """What was listed decides whether this program's expert goes on with its list, or where with the tensors."""
    expert = state + tl.program_id(0) * FIELDS
    listed = tl.load(expert + LISTED)
    if listed >= 0:
        first, last = tl.load(expert + THRESHOLD), tl.load(expert + LAST)
        rank = tl.load(expert + KEEP) - tl.load(expert + ABOVE)
        none = tl.full([], -1, tl.int64)
        if rank <= 0:
            first, last = above_range(last, LARGEST, 0)
            listed = none
        elif rank > listed:
            first, last = below_range(first, 0)
            listed = none
        elif listed > capacity:
            listed = none
        else:
            tl.store(expert + KEEP, rank)
        tl.debug_barrier()
        tl.store(expert + ABOVE, tl.zeros([], tl.int64))
        tl.store(expert + THRESHOLD, first)
        tl.store(expert + LAST, last)
        tl.store(expert + LISTED, listed)
        tl.store(expert + SHIFT, shift_of(first, last, 0, BINS))


def new_lists(scope: Scope) -> Tensor:
    """[num_tasks, capacity]"""
    dtype = torch.int64 if scope.wide else torch.int32
    return torch.empty(scope.num_tasks, scope.numel // SHARE, dtype=dtype, device=scope.device)


def take_lists(scope: Scope, state: Tensor, lists: Tensor) -> None:
    _take_lists[(scope.num_tasks,)](
        state, lists.shape[1], LARGEST=LARGEST[scope.compute], BINS=1 << BIN_BITS, num_warps=1, enable_fp_fusion=False
    )


def list_keys(scope: Scope, state: Tensor, histogram: Tensor, nonfinite: str, finite: FiniteCheck) -> Tensor:
    """Of all experts whose range is from a sample."""
    lists = new_lists(scope)
    for group in scope.groups:
        _gather[(pieces_of(group),)](
            *group.place, scope.num_tasks, state, lists, lists.shape[1], finite.found, **group.dtypes,
            HAS_BASE=scope.has_base, DROP=nonfinite == "drop", CHECKED=finite.wanted, CHUNK=CHUNK, PIECE=PIECE,
            LANES=LANES, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    take_lists(scope, state, lists)
    return lists
