"""A chunk of parameters merged by TIES, block by block; in passing the elements whose decision is not certain yet."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .addresses import OFFSET, locate_chunk, whole_blocks
from .finite import key_of
from .ties_block import merge_block, signs_and_draws


@triton.jit
def merge_chunk(
    table, num_parts, columns, chunk, num_tasks, limits, numbers, rescales, unique_scales, keep, draw_sign, entries,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, HAS_UNIQUE: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr,
    HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr, NEAR: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Gives the elected signs' sum and the draws' count.

    NEAR, as in `merge_block`: lists ROOM elements that lie in the range of an expert, and gives how many there are, how
    many keys of every expert lie above its range, and the largest key of all.
    """
    part, row, begin, count = locate_chunk(table, num_parts, columns, chunk, CHUNK)
    flat = tl.load(row + OFFSET) + begin
    lanes = tl.arange(0, BLOCK)
    if HAS_RESCALES:
        rescales += part * num_tasks
    if HAS_UNIQUE:
        unique_scales += part * num_tasks
    listed = tl.zeros([], tl.int32)
    elections = tl.zeros([BLOCK * STORED.primitive_bitwidth // 128], tl.int32)
    above = tl.zeros([NEAR if NEAR > 0 else 1], tl.int32)
    largest = key_of(tl.zeros([BLOCK], COMPUTE))
    whole = whole_blocks(row, count, BLOCK)
    for at in range(0, whole, BLOCK):
        elections_of_block, near, above_of_block, largest_of_block = merge_block(
            row, part, begin + at, BLOCK, flat + at, lanes, num_tasks, limits, numbers, rescales, unique_scales,
            keep, draw_sign, RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, True, BLOCK, TOGETHER, NEAR,
        )  # fmt: skip
        elections += elections_of_block
        if NEAR > 0:
            listed = _list(entries, listed, near, at + lanes, ROOM)
            above += above_of_block
            largest = tl.maximum(largest, largest_of_block)
    for at in range(whole, count, BLOCK):
        elections_of_block, near, above_of_block, largest_of_block = merge_block(
            row, part, begin + at, count - at, flat + at, lanes, num_tasks, limits, numbers, rescales, unique_scales,
            keep, draw_sign, RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, False, BLOCK, TOGETHER, NEAR,
        )  # fmt: skip
        elections += elections_of_block
        if NEAR > 0:
            listed = _list(entries, listed, near, at + lanes, ROOM)
            above += above_of_block
            largest = tl.maximum(largest, largest_of_block)
    signs, draws = signs_and_draws(elections)
    return signs, draws, listed, above, largest


@triton.jit
def _list(entries, listed, near, places, ROOM: tl.constexpr):
    """Behind the `listed` ones: where in its chunk an element lies, and the experts in whose ranges."""
    here = (near != 0).to(tl.int32)
    to = listed + tl.cumsum(here, axis=0) - here
    entry = (places.to(tl.int64) << 32) | (near.to(tl.int64) & 0xFFFFFFFF)
    tl.store(entries + to, entry, mask=(here != 0) & (to < ROOM))
    return listed + tl.sum(here, axis=0)
