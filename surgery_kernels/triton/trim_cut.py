"""Where an expert keeps some of the entries that equal its threshold: the flat index before which it does."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, EXPERTS, NUMEL, OFFSET, SCOPE_CHUNK, Scope, is_whole, load, locate_chunk, part_of
from .finite import key_of, task_vector
from .trim_rounds import BUDGET, CUT, FIELDS, PROGRAMS, THRESHOLD, TIE_CHUNK, TIES, TIES_LEFT


@triton.jit
def _count_ties(
    table, num_parts, columns, num_chunks, num_tasks, state, ties, scope_chunks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, TASKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The keys of every chunk that equal the threshold of an expert with more ties than it keeps.

    Seldom there is one: few programs go through all chunks.
    """
    tasks = tl.arange(0, TASKS)
    budgets = tl.load(state + tasks * FIELDS + BUDGET, mask=tasks < num_tasks, other=0)
    counts = tl.load(state + tasks * FIELDS + TIES, mask=tasks < num_tasks, other=0)
    if tl.max((budgets < counts).to(tl.int32), axis=0) == 0:
        return
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        _, row, begin, count = locate_chunk(table, num_parts, columns, chunk, CHUNK)
        here = ties + tl.load(row + SCOPE_CHUNK) + begin // CHUNK
        if is_whole(row, count, CHUNK):
            _count_ties_of_chunk(
                row, begin, count, num_tasks, state, here, scope_chunks,
                STORED, COMPUTE, HAS_BASE, DROP, True, CHUNK,
            )  # fmt: skip
        else:
            _count_ties_of_chunk(
                row, begin, count, num_tasks, state, here, scope_chunks,
                STORED, COMPUTE, HAS_BASE, DROP, False, CHUNK,
            )  # fmt: skip


@triton.jit
def _count_ties_of_chunk(
    row, begin, count, num_tasks, state, ties, scope_chunks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for t in range(num_tasks):
        expert = state + t * FIELDS
        if tl.load(expert + BUDGET) < tl.load(expert + TIES):
            here = _ties_of(row, t, begin, count, expert, STORED, COMPUTE, HAS_BASE, DROP, WHOLE, CHUNK)
            tl.store(ties + t * scope_chunks, tl.sum(here))


@triton.jit
def _ties_of(
    row, t, begin, count, expert,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)
    base = tl.zeros([CHUNK], STORED)
    if HAS_BASE:
        base = load(tl.load(row + BASE), begin, lanes, count, STORED, STORED, WHOLE)
    x = load(tl.load(row + EXPERTS + t), begin, lanes, count, STORED, STORED, WHOLE)
    key = key_of(task_vector(x, base, HAS_BASE, DROP).to(COMPUTE))
    return ((key == tl.load(expert + THRESHOLD)) & (lanes < count)).to(tl.int32)


@triton.jit
def _find_tie_chunk(state, ties, scope_chunks, BLOCK: tl.constexpr):
    """The chunk where the budget of an expert's ties ends."""
    t = tl.program_id(0)
    expert = state + t * FIELDS
    left = tl.load(expert + BUDGET)
    if left < tl.load(expert + TIES):
        chunk = tl.zeros([], tl.int64)
        rank = chunk
        for begin in range(0, scope_chunks, BLOCK):
            chunks = begin + tl.arange(0, BLOCK)
            counts = tl.load(ties + t * scope_chunks + chunks, mask=chunks < scope_chunks, other=0).to(tl.int64)
            before = tl.cumsum(counts) - counts
            here = (before < left) & (left <= before + counts)
            chunk += tl.sum(tl.where(here, chunks, 0))
            rank += tl.sum(tl.where(here, left - before, 0))
            left -= tl.sum(counts)
        tl.store(expert + TIE_CHUNK, chunk)
        tl.store(expert + TIES_LEFT, rank)


@triton.jit
def _find_cut(
    table, num_parts, columns, state,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The flat index after the last tie that is kept, if it lies in a tensor of this dtype."""
    t = tl.program_id(0)
    expert = state + t * FIELDS
    if tl.load(expert + BUDGET) < tl.load(expert + TIES):
        chunk = tl.load(expert + TIE_CHUNK)
        row = table + part_of(table, num_parts, columns, chunk, SCOPE_CHUNK).to(tl.int64) * columns
        begin = (chunk - tl.load(row + SCOPE_CHUNK)) * CHUNK
        numel = tl.load(row + NUMEL)
        if (begin >= 0) & (begin < numel):
            count = tl.minimum(numel - begin, CHUNK).to(tl.int32)
            here = _ties_of(row, t, begin, count, expert, STORED, COMPUTE, HAS_BASE, DROP, False, CHUNK)
            last = (here == 1) & (tl.cumsum(here) == tl.load(expert + TIES_LEFT))
            index = tl.sum(tl.where(last, tl.arange(0, CHUNK), 0))
            tl.store(expert + CUT, tl.load(row + OFFSET) + begin + index + 1)


def cut_ties(scope: Scope, state: Tensor, nonfinite: str) -> None:
    """Sets the cut of every expert that keeps some of its ties, and not all."""
    ties = torch.zeros(scope.num_tasks * scope.num_chunks, dtype=torch.int32, device=scope.device)
    options = {"HAS_BASE": scope.has_base, "DROP": nonfinite == "drop", "CHUNK": CHUNK}
    launch = {"num_warps": 8, "enable_fp_fusion": False}
    for group in scope.groups:
        _count_ties[(min(group.num_chunks, PROGRAMS),)](
            *group.place, group.num_chunks, scope.num_tasks, state, ties, scope.num_chunks,
            **group.dtypes, **options, TASKS=triton.next_power_of_2(scope.num_tasks), **launch,
        )  # fmt: skip
    _find_tie_chunk[(scope.num_tasks,)](state, ties, scope.num_chunks, BLOCK=1024, num_warps=8, enable_fp_fusion=False)
    for group in scope.groups:
        _find_cut[(scope.num_tasks,)](
            *group.place, state, **group.dtypes, **options, **launch
        )  # fmt: skip
