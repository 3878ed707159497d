"""Where trim begins: a range of keys per expert that holds its threshold, from a sample."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, EXPERTS, NUMEL, OFFSET, Scope
from .finite import key_of, task_vector
from .trim_rounds import (
    ABOVE,
    BIN_BITS,
    COPIES,
    CUT,
    FIELDS,
    FIRST,
    KEEP,
    LARGEST,
    LAST,
    LISTED,
    SAMPLED,
    SHIFT,
    THRESHOLD,
    VARIANCE,
    add_keys,
    shift_of,
    sum_of,
)

PLACES, CLUSTER = 1024, 16  # of the sample: places spread over the scope, neighbours at each
PLACES_AT_ONCE = 256


@triton.jit
def _sampled_keys(
    table, num_parts, columns, t, place, places, numel, part_bits,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """Of neighbours at a pseudo-random point of the place-th stride, and which of them there are."""
    stride = numel // places
    random = (place.to(tl.int64) * 0x9E3779B1) & 0xFFFFFFFF
    position = place * stride + (random * (stride & 0x7FFFFFFF) >> 32)
    low = tl.zeros_like(random)
    high = low + num_parts - 1
    for _ in range(part_bits):
        middle = (low + high + 1) // 2
        below = tl.load(table + middle * columns + OFFSET) <= position
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    row = table + low * columns
    of_part = tl.load(row + NUMEL)
    begin = position - tl.load(row + OFFSET)
    here = (begin >= 0) & (begin < of_part)  # else in a tensor of another dtype
    begin = tl.maximum(tl.minimum(begin, of_part - CLUSTER), 0)
    at = begin[:, None] + tl.arange(0, CLUSTER)[None, :]
    there = here[:, None] & (at < of_part[:, None])
    expert = tl.load(row + EXPERTS + t).to(tl.pointer_type(STORED))
    x = tl.load(expert[:, None] + at, mask=there, other=0)
    base = x
    if HAS_BASE:
        base = tl.load(tl.load(row + BASE).to(tl.pointer_type(STORED))[:, None] + at, mask=there, other=0)
    return key_of(task_vector(x, base, HAS_BASE, DROP).to(COMPUTE)), there


@triton.jit
def _sample(
    table, num_parts, columns, num_tasks, numel, part_bits, sample,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    PLACES: tl.constexpr, CLUSTER: tl.constexpr, PLACES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """sample: [num_tasks, PLACES, CLUSTER]"""
    t = tl.program_id(0)
    place = tl.program_id(1) * PLACES_AT_ONCE + tl.arange(0, PLACES_AT_ONCE)
    key, there = _sampled_keys(
        table, num_parts, columns, t, place, PLACES, numel, part_bits, STORED, COMPUTE, HAS_BASE, DROP, CLUSTER
    )
    lanes = tl.arange(0, CLUSTER)
    tl.store(sample + (t * PLACES + place[:, None]) * CLUSTER + lanes[None, :], key, mask=there)


@triton.jit
def _count_sample(
    table, num_parts, columns, num_tasks, numel, part_bits, state, histogram,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    CLUSTER: tl.constexpr, PLACES_AT_ONCE: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Adds the keys of a larger sample to the histograms [COPIES, num_tasks, BINS] of open experts."""
    t = tl.program_id(0)
    expert = state + t * FIELDS
    if tl.load(expert + THRESHOLD) < tl.load(expert + LAST):
        place = tl.program_id(1) * PLACES_AT_ONCE + tl.arange(0, PLACES_AT_ONCE)
        places = tl.num_programs(1) * PLACES_AT_ONCE
        key, there = _sampled_keys(
            table, num_parts, columns, t, place, places, numel, part_bits, STORED, COMPUTE, HAS_BASE, DROP, CLUSTER
        )
        add_keys(tl.where(there, key, -1), expert, histogram + (tl.program_id(1) % COPIES * num_tasks + t) * BINS)
        tl.atomic_add(expert + SAMPLED, sum_of(there.to(tl.int32)).to(tl.int64), sem="relaxed")


@triton.jit
def _kth_largest(keys, rank, BITS: tl.constexpr):
    found = tl.zeros([], keys.dtype)
    for i in range(BITS):
        higher = found | (tl.full([], 1, keys.dtype) << BITS - 1 - i)
        found = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= rank, higher, found)
    return found


@triton.jit
def _bracket(
    state, sample, numel,
    LARGEST: tl.constexpr, BITS: tl.constexpr, SPARE: tl.constexpr, BINS: tl.constexpr,
    PLACES: tl.constexpr, CLUSTER: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """A range that holds the threshold with overwhelming probability; neighbours may be alike, places are not."""
    expert = state + tl.program_id(0) * FIELDS
    if tl.load(expert + THRESHOLD) < tl.load(expert + LAST):
        place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
        keys = tl.load(sample + place[:, None] * CLUSTER + tl.arange(0, CLUSTER)[None, :])
        size = tl.sum((keys >= 0).to(tl.int32))
        share = tl.load(expert + KEEP).to(tl.float64) / numel.to(tl.float64)
        expected = share * size.to(tl.float64)
        centre = tl.minimum(tl.maximum((expected + 0.5).to(tl.int32), 1), size)
        middle = _kth_largest(keys, centre, BITS)
        over_mean = tl.sum((keys >= middle).to(tl.int32), axis=1).to(tl.float64) - expected / PLACES
        variance = tl.maximum(tl.sum(over_mean * over_mean), expected * (1 - share))
        half_width = (4 * tl.sqrt(variance.to(tl.float32))).to(tl.int32) + 8
        first = tl.zeros([], tl.int64)
        last = first + LARGEST
        if centre + half_width <= size:
            first = _kth_largest(keys, centre + half_width, BITS).to(tl.int64)
        if centre > half_width:  # many may share this value, too: it is left out
            last = _kth_largest(keys, centre - half_width, BITS).to(tl.int64) - (1 << SPARE)
        # a range of one key would count as closed before anything was counted
        last = tl.maximum(last, first + (1 << SPARE))
        tl.store(expert + THRESHOLD, first)
        tl.store(expert + LAST, last)
        tl.store(expert + SHIFT, shift_of(first, last, SPARE, BINS))
        if LISTS:
            tl.store(expert + LISTED, tl.zeros([], tl.int64))
            tl.store(expert + VARIANCE, variance.to(tl.int64) + 1)


@triton.jit
def _guess(state, guess, histogram, numel, grown, BINS: tl.constexpr, COPIES: tl.constexpr):
    """A narrower range from the counts of a larger sample, and its middle; grown: how much larger that is.

    Every thread reads what one thread writes: all of it is read before the sums, where threads wait for one another.
    """
    t = tl.program_id(0)
    expert, guessed = state + t * FIELDS, guess + t * FIELDS
    first, last, shift = tl.load(expert + THRESHOLD), tl.load(expert + LAST), tl.load(expert + SHIFT)
    cut, above, sampled = tl.load(expert + CUT), tl.load(expert + ABOVE), tl.load(expert + SAMPLED)
    share = tl.load(expert + KEEP).to(tl.float64) / numel.to(tl.float64)
    variance = tl.load(expert + VARIANCE).to(tl.float32) * grown
    middle = first
    if first < last:
        lanes = tl.arange(0, BINS)
        copies = histogram + (tl.arange(0, COPIES)[:, None] * tl.num_programs(0) + t) * BINS + lanes[None, :]
        counts = tl.sum(tl.load(copies), axis=0)
        over = above + tl.sum(counts) - tl.cumsum(counts)  # keys in higher bins
        expected = (share * sampled.to(tl.float64)).to(tl.int64)
        half_width = (4 * tl.sqrt(variance)).to(tl.int64) + 8
        low = tl.max(tl.where(over + counts >= expected + half_width, lanes, 0)).to(tl.int64)
        centre = tl.max(tl.where(over + counts >= expected, lanes, 0)).to(tl.int64)
        high = tl.min(tl.where(over <= expected - half_width, lanes, BINS - 1)).to(tl.int64)
        middle = first + (centre << shift)
        last = tl.minimum(first + ((high + 1) << shift) - 1, last)
        first += low << shift
        last = tl.maximum(last, first + 1)  # as in _bracket
        tl.debug_barrier()
        tl.store(copies, tl.zeros([COPIES, BINS], tl.int64))
        tl.store(expert + ABOVE, tl.zeros([], tl.int64))
        tl.store(expert + THRESHOLD, first)
        tl.store(expert + LAST, last)
        tl.store(expert + SHIFT, shift_of(first, last, 0, BINS))
    else:
        first, last = tl.full([], 1, tl.int64), tl.zeros([], tl.int64)
    tl.store(guessed + THRESHOLD, middle)
    tl.store(guessed + CUT, cut)
    tl.store(guessed + FIRST, first)
    tl.store(guessed + LAST, last)


def start_from_sample(scope: Scope, state: Tensor, nonfinite: str, bits: int, spare: int, lists: bool) -> None:
    """The first ranges, of all experts whose threshold is open; lists: the keys in there will be listed."""
    places = {"PLACES": PLACES, "CLUSTER": CLUSTER}
    keys = torch.int64 if scope.wide else torch.int32
    sample = torch.full((scope.num_tasks, PLACES, CLUSTER), -1, dtype=keys, device=scope.device)
    for group in scope.groups:
        _sample[(scope.num_tasks, PLACES // PLACES_AT_ONCE)](
            *group.place, scope.num_tasks, scope.numel, (group.table.shape[0] - 1).bit_length(), sample, **group.dtypes,
            **places, HAS_BASE=scope.has_base, DROP=nonfinite == "drop", PLACES_AT_ONCE=PLACES_AT_ONCE,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    _bracket[(scope.num_tasks,)](
        state, sample, scope.numel, **places, LARGEST=LARGEST[scope.compute], BITS=bits, SPARE=spare,
        BINS=1 << BIN_BITS, LISTS=lists, num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip


def guess_from_sample(scope: Scope, state: Tensor, nonfinite: str, histogram: Tensor) -> Tensor:
    """Narrows the first ranges by a larger sample. Gives limits from their middles, with the ranges.

    The sample costs its size, what lies in its ranges costs numel / sqrt(size): the sum is least near numel^(2/3).
    """
    guess = torch.empty_like(state)
    programs = max(PLACES // PLACES_AT_ONCE, int(4 * scope.numel ** (2 / 3)) // (CLUSTER * PLACES_AT_ONCE))
    counters = {"BINS": 1 << BIN_BITS, "COPIES": COPIES}
    for group in scope.groups:
        _count_sample[(scope.num_tasks, programs)](
            *group.place, scope.num_tasks, scope.numel, (group.table.shape[0] - 1).bit_length(), state, histogram,
            **group.dtypes, **counters, HAS_BASE=scope.has_base, DROP=nonfinite == "drop", CLUSTER=CLUSTER,
            PLACES_AT_ONCE=PLACES_AT_ONCE, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    _guess[(scope.num_tasks,)](
        state, guess, histogram, scope.numel, programs * PLACES_AT_ONCE / PLACES, **counters, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return guess
