"""A TIES merge in one read. It goes by what a sample expects the thresholds to be, and lists the elements whose keys
lie near them; when the exact limits are known, the few of those that they decide otherwise are merged once more. Where
a threshold lies elsewhere than the sample had it, everything is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, EXPERTS, OFFSET, Group, Scope, load, locate_chunk
from .finite import FiniteCheck, is_finite_key, key_of, task_vector
from .ties_block import is_above, limits_of, merge_block, range_of, signs_and_draws
from .ties_chunk import merge_chunk
from .trim_lists import new_lists, take_lists
from .trim_rounds import ABOVE, FIELDS, FIRST, LAST, LISTED, THRESHOLD
from .trim_sample import guess_from_sample

ONE_READ_FROM = 1 << 28  # bytes of inputs with more than 16 bits; less than that a cache has the second time, or nearly
MOST_EXPERTS = 32  # a bit for each
BLOCK_BYTES = 512  # of a tensor, read together: 16 for each thread of a warp, which waits for no other
ROOM = CHUNK // 4  # listed elements of a chunk; where there are more, all of its elements are looked at again
TILE = 64  # listed elements looked at together


@triton.jit
def _merge_near(
    table, num_parts, columns, num_tasks, guess, numbers, rescales, unique_scales, keep, nonfinite, sign_sum, draws,
    state, signs, entries, counts,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, HAS_UNIQUE: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr,
    HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr,
    CHECKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
    NEAR: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The chunk of this program by a guess; lists its elements near the thresholds and counts keys above the ranges.

    Bound: reads each input once, writes the output once.
    """
    chunk = tl.program_id(0)
    entries += chunk.to(tl.int64) * ROOM
    signs_here, draws_here, listed, above, largest = merge_chunk(
        table, num_parts, columns, chunk, num_tasks, guess, numbers, rescales, unique_scales, keep, 1, entries,
        RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT, ALIGNED_ROWS,
        STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, CHUNK, BLOCK, TOGETHER, NEAR, ROOM,
    )  # fmt: skip
    if RULE == "paper" or RULE == "paper_max":
        tl.atomic_add(sign_sum, signs_here.to(tl.int64), sem="relaxed")
        tl.store(signs + chunk, signs_here)
        tl.store(draws + chunk, draws_here)
    tl.store(counts + chunk, listed)
    tasks = tl.arange(0, NEAR)
    tl.atomic_add(state + tasks * FIELDS + ABOVE, above.to(tl.int64), mask=tasks < num_tasks, sem="relaxed")
    if CHECKED:  # noqa: SIM102  # there is no pointer to add to otherwise
        if not is_finite_key(tl.max(largest, axis=0)):
            tl.atomic_add(nonfinite, tl.full([], 1, tl.int64), sem="relaxed")


@triton.jit
def _entries_of(entries, listed, count, i, ROOM: tl.constexpr, TILE: tl.constexpr):
    """Of a chunk, from the i-th on: where they lie, whether they are, and the experts near which; if there are more
    than fit into the list, all elements of the chunk and all experts."""
    lanes = i + tl.arange(0, TILE)
    fits = listed <= ROOM
    there = lanes < tl.where(fits, listed, count)
    entry = tl.load(entries + lanes, mask=there & fits, other=0)
    at = tl.where(fits, (entry >> 32).to(tl.int32), lanes)
    experts = tl.where(fits, entry.to(tl.int32), -1)
    return tl.where(there, at, 0), there, tl.where(there, experts, 0)


@triton.jit
def _is_near(experts, t, num_tasks):
    return (experts >> (num_tasks - 1 - t)) & 1


@triton.jit
def _tau_at(
    row, t, base, at, wanted, STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr
):
    """Of single elements, where wanted."""
    x = load(tl.load(row + EXPERTS + t), at, tl.zeros_like(at), wanted, STORED, STORED, False)
    return task_vector(x, base, HAS_BASE, DROP).to(COMPUTE)


@triton.jit
def _base_at(row, at, wanted, STORED: tl.constexpr, HAS_BASE: tl.constexpr):
    base = tl.zeros_like(at).to(STORED)
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, tl.zeros_like(at), wanted, STORED, STORED, False)
    return base


@triton.jit
def _list_keys(
    table, num_parts, columns, num_tasks, guess, state, entries, counts, lists, capacity,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The keys of this program's chunk that lie in the ranges, a list for every expert, in any order."""
    chunk = tl.program_id(0)
    _, row, begin, count = locate_chunk(table, num_parts, columns, chunk, CHUNK)
    entries += chunk.to(tl.int64) * ROOM
    listed = tl.load(counts + chunk)
    for i in range(0, tl.where(listed <= ROOM, listed, count), TILE):
        at, there, experts = _entries_of(entries, listed, count, i, ROOM, TILE)
        base = _base_at(row, begin + at, there.to(tl.int32), STORED, HAS_BASE)
        for t in range(num_tasks):
            wanted = _is_near(experts, t, num_tasks)
            key = key_of(_tau_at(row, t, base, begin + at, wanted, STORED, COMPUTE, HAS_BASE, DROP))
            first, last = range_of(guess, t, key)
            inside = (wanted != 0) & (first <= key) & (key <= last)
            here = inside.to(tl.int32)
            found = tl.sum(here, axis=0)
            if found > 0:
                place = tl.atomic_add(state + t * FIELDS + LISTED, found.to(tl.int64), sem="relaxed")
                if place + found <= capacity:
                    tl.store(lists + t * capacity + place + tl.cumsum(here, axis=0) - here, key, mask=inside)


@triton.jit
def _hold(guess, limits, num_tasks, NEAR: tl.constexpr):
    """Whether all thresholds that were to be found lie in their ranges."""
    tasks = tl.arange(0, NEAR)
    there = tasks < num_tasks
    first = tl.load(guess + tasks * FIELDS + FIRST, mask=there, other=1)
    last = tl.load(guess + tasks * FIELDS + LAST, mask=there, other=0)
    threshold = tl.load(limits + tasks * FIELDS + THRESHOLD, mask=there, other=0)
    elsewhere = (first <= last) & ((threshold < first) | (threshold > last))
    return tl.max(elsewhere.to(tl.int32), axis=0) == 0


@triton.jit
def _correct(
    table, num_parts, columns, num_tasks, limits, numbers, rescales, unique_scales, keep, nonfinite, sign_sum, draws,
    guess, signs, entries, counts,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, HAS_UNIQUE: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr,
    HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr,
    CHECKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
    NEAR: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The elements of this program's chunk that the limits decide otherwise than the guess, merged again."""
    if CHECKED:  # noqa: SIM102  # there is no pointer to load from otherwise
        if tl.load(nonfinite) != 0:
            return
    chunk = tl.program_id(0)
    if _hold(guess, limits, num_tasks, NEAR):
        more_signs, drawn = _correct_chunk(
            table, num_parts, columns, chunk, num_tasks, guess, limits, numbers, rescales, unique_scales, keep,
            entries + chunk.to(tl.int64) * ROOM, tl.load(counts + chunk),
            RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, CHUNK, ROOM, TILE,
        )  # fmt: skip
    else:
        more_signs, drawn, _, _, _ = merge_chunk(
            table, num_parts, columns, chunk, num_tasks, limits, numbers, rescales, unique_scales, keep, 1, None,
            RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, CHUNK, BLOCK, TOGETHER, 0, ROOM,
        )  # fmt: skip
        if RULE == "paper" or RULE == "paper_max":
            more_signs -= tl.load(signs + chunk)
    if RULE == "paper" or RULE == "paper_max":
        if more_signs != 0:
            tl.atomic_add(sign_sum, more_signs.to(tl.int64), sem="relaxed")
        if drawn > 0:
            tl.store(draws + chunk, drawn)


@triton.jit
def _correct_chunk(
    table, num_parts, columns, chunk, num_tasks, guess, limits, numbers, rescales, unique_scales, keep, entries, listed,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, HAS_UNIQUE: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr,
    HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """By how much the sum of the elected signs changes, and how many of the corrected elements are draws."""
    part, row, begin, count = locate_chunk(table, num_parts, columns, chunk, CHUNK)
    flat = tl.load(row + OFFSET) + begin
    if HAS_RESCALES:
        rescales += part * num_tasks
    if HAS_UNIQUE:
        unique_scales += part * num_tasks
    before = tl.zeros([TILE * STORED.primitive_bitwidth // 128], tl.int32)
    after = before
    for i in range(0, tl.where(listed <= ROOM, listed, count), TILE):
        at, there, experts = _entries_of(entries, listed, count, i, ROOM, TILE)
        base = _base_at(row, begin + at, there.to(tl.int32), STORED, HAS_BASE)
        zeros, differs = tl.zeros_like(at), tl.zeros_like(experts)
        for t in range(num_tasks):
            wanted = _is_near(experts, t, num_tasks)
            tau = _tau_at(row, t, base, begin + at, wanted, STORED, COMPUTE, HAS_BASE, DROP)
            guessed = is_above(tau, limits_of(guess, t, flat + at, zeros, COMPUTE, CUTS, TILE))
            is_kept = is_above(tau, limits_of(limits, t, flat + at, zeros, COMPUTE, CUTS, TILE))
            differs = differs | (wanted & (guessed != is_kept).to(tl.int32))
        if tl.max(differs, axis=0) > 0:
            if RULE == "paper" or RULE == "paper_max":
                elections_before, _, _, _ = merge_block(
                    row, part, begin + at, differs, flat + at, zeros, num_tasks, guess, numbers, rescales,
                    unique_scales, keep, 1, RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT,
                    ALIGNED_ROWS, STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, False, TILE, 1, 0,
                )  # fmt: skip
                before += elections_before
            elections_after, _, _, _ = merge_block(
                row, part, begin + at, differs, flat + at, zeros, num_tasks, limits, numbers, rescales,
                unique_scales, keep, 1, RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT,
                ALIGNED_ROWS, STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, False, TILE, 1, 0,
            )  # fmt: skip
            after += elections_after
    signs_before, _ = signs_and_draws(before)
    signs_after, drawn = signs_and_draws(after)
    return signs_after - signs_before, drawn


def reads_once(scope: Scope) -> bool:
    """By size, never by luck."""
    if scope.num_tasks > MOST_EXPERTS:
        return False
    firsts = scope.experts[:: scope.num_tasks]
    wide = sum(x.numel() * x.element_size() for x in firsts if x.element_size() > 2)
    return wide * (scope.num_tasks + scope.has_base) >= ONE_READ_FROM


class Launch(NamedTuple):
    """Of a merge's kernels for the tensors of one dtype."""

    group: Group
    arguments: tuple[Any, ...]  # behind the limits
    constants: dict[str, Any]


@dataclass(frozen=True)
class Near:
    """What a launch lists of every chunk."""

    signs: Tensor  # int32 [num_chunks]: the sum of the elected ones
    entries: Tensor  # int64 [num_chunks, ROOM]
    counts: Tensor  # int32 [num_chunks]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.signs, self.entries, self.counts


class OneRead:
    """The merge that is the one read of `find_limits`, and its correction."""

    def __init__(self, scope: Scope, launches: Sequence[Launch]) -> None:
        self.merged = False
        self._scope = scope
        self._launches, self._near = [], []
        for group, arguments, constants in launches:
            signs, counts = torch.empty(2, group.num_chunks, dtype=torch.int32, device=scope.device)
            entries = torch.empty(group.num_chunks, ROOM, dtype=torch.int64, device=scope.device)
            self._near.append(Near(signs, entries, counts))
            of_warp = {
                "BLOCK": BLOCK_BYTES // group.dtype.itemsize, "NEAR": triton.next_power_of_2(scope.num_tasks),
                "ROOM": ROOM, "num_warps": 1,
            }  # fmt: skip
            self._launches.append(Launch(group, arguments, {**constants, **of_warp}))

    def read(self, scope: Scope, state: Tensor, histogram: Tensor, nonfinite: str, finite: FiniteCheck) -> Tensor:
        """Merges by a guess, and lists the keys of every range, as `list_keys` does."""
        self._guess = guess_from_sample(scope, state, nonfinite, histogram)
        lists = new_lists(scope)
        for (group, arguments, constants), near in zip(self._launches, self._near, strict=True):
            _merge_near[(group.num_chunks,)](
                *group.place, scope.num_tasks, self._guess, *arguments, state, *near.arguments, **constants
            )  # fmt: skip
        for (group, _, _), near in zip(self._launches, self._near, strict=True):
            _list_keys[(group.num_chunks,)](
                *group.place, scope.num_tasks, self._guess, state, near.entries, near.counts, lists, lists.shape[1],
                **group.dtypes, HAS_BASE=scope.has_base, DROP=nonfinite == "drop", CHUNK=CHUNK, ROOM=ROOM, TILE=TILE,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        take_lists(scope, state, lists)
        self.merged = True
        return lists

    def correct(self, limits: Tensor) -> None:
        for (group, arguments, constants), near in zip(self._launches, self._near, strict=True):
            _correct[(group.num_chunks,)](
                *group.place, self._scope.num_tasks, limits, *arguments, self._guess, *near.arguments, **constants,
                TILE=TILE,
            )  # fmt: skip
