"""The rounds of trim: a range of keys per expert, first from a sample, then narrowed by what a histogram counted."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, EXPERTS, NUMEL, OFFSET, Scope, is_whole, load, locate
from .finite import FiniteCheck, is_finite, key_of, task_vector

PLACES, CLUSTER = 1024, 16  # of the sample: places spread over the scope, neighbours at each
PLACES_AT_ONCE = 256
BIN_BITS = 11
COPIES = 4  # of the histogram: a value that many keys share would queue up at one address

# State of an expert, int64. It keeps keys above THRESHOLD, and those equal to it with a flat index below CUT. While its
# range is open THRESHOLD is the lower end and LAST the upper; then TIES keys equal it and BUDGET of them are kept.
THRESHOLD, CUT, LAST, SHIFT, KEEP, ABOVE, BUDGET, TIES = (tl.constexpr(field) for field in range(8))
TIE_CHUNK, TIES_LEFT = LAST, SHIFT  # where the tie before CUT is: a chunk of the scope, and its rank there
FIELDS = tl.constexpr(8)

LARGEST = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}


@triton.jit
def _shift_of(first, last, SPARE: tl.constexpr, BINS: tl.constexpr):
    """Keys per bin, as a power of two, where `BINS` bins hold the range."""
    shift = tl.zeros([], tl.int64) + SPARE
    while ((last - first) >> shift) >= BINS:
        shift += 1
    return shift


@triton.jit
def _is_open(state, num_tasks, TASKS: tl.constexpr):
    tasks = tl.arange(0, TASKS)
    first = tl.load(state + tasks * FIELDS + THRESHOLD, mask=tasks < num_tasks, other=0)
    last = tl.load(state + tasks * FIELDS + LAST, mask=tasks < num_tasks, other=0)
    return tl.sum((first < last).to(tl.int32)) > 0


@triton.jit
def _sample(
    table, num_parts, columns, num_tasks, numel, part_bits, sample,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    PLACES: tl.constexpr, CLUSTER: tl.constexpr, PLACES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The keys of neighbours at a pseudo-random point of every stride.  # sample: [num_tasks, PLACES, CLUSTER]"""
    t = tl.program_id(0)
    place = tl.program_id(1) * PLACES_AT_ONCE + tl.arange(0, PLACES_AT_ONCE)
    stride = numel // PLACES
    random = (place.to(tl.int64) * 0x9E3779B1) & 0xFFFFFFFF
    position = place * stride + (random * (stride & 0x7FFFFFFF) >> 32)
    low = tl.zeros([PLACES_AT_ONCE], tl.int64)
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
    lanes = tl.arange(0, CLUSTER)
    at = begin[:, None] + lanes[None, :]
    there = here[:, None] & (at < of_part[:, None])
    expert = tl.load(row + EXPERTS + t).to(tl.pointer_type(STORED))
    x = tl.load(expert[:, None] + at, mask=there, other=0)
    base = x
    if HAS_BASE:
        base = tl.load(tl.load(row + BASE).to(tl.pointer_type(STORED))[:, None] + at, mask=there, other=0)
    key = key_of(task_vector(x, base, HAS_BASE, DROP).to(COMPUTE))
    tl.store(sample + (t * PLACES + place[:, None]) * CLUSTER + lanes[None, :], key, mask=there)


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
    PLACES: tl.constexpr, CLUSTER: tl.constexpr,
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
        variance = tl.maximum(tl.sum(over_mean * over_mean), expected * (1 - share)).to(tl.float32)
        half_width = (4 * tl.sqrt(variance)).to(tl.int32) + 8
        first = tl.zeros([], tl.int64)
        last = first + LARGEST
        if centre + half_width <= size:
            first = _kth_largest(keys, centre + half_width, BITS).to(tl.int64)
        if centre > half_width:
            last = _kth_largest(keys, centre - half_width, BITS).to(tl.int64)
        # a range of one key would count as closed before anything was counted
        last = tl.maximum(last, first + (1 << SPARE))
        tl.store(expert + THRESHOLD, first)
        tl.store(expert + LAST, last)
        tl.store(expert + SHIFT, _shift_of(first, last, SPARE, BINS))


@triton.jit
def _count(
    table, num_parts, columns, num_tasks, state, histogram, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CHECKED: tl.constexpr,
    TASKS: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds the keys of this chunk to the histograms [COPIES, num_tasks, BINS] of the open experts.

    CHECKED: counts the NaN and infinite entries of every expert, too.
    """
    if not CHECKED:  # noqa: SIM102
        if not _is_open(state, num_tasks, TASKS):
            return
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    if is_whole(row, count, CHUNK):
        _count_chunk(
            row, begin, count, num_tasks, state, histogram, nonfinite,
            STORED, COMPUTE, HAS_BASE, DROP, CHECKED, True, BINS, COPIES, CHUNK,
        )  # fmt: skip
    else:
        _count_chunk(
            row, begin, count, num_tasks, state, histogram, nonfinite,
            STORED, COMPUTE, HAS_BASE, DROP, CHECKED, False, BINS, COPIES, CHUNK,
        )  # fmt: skip


@triton.jit
def _count_chunk(
    row, begin, count, num_tasks, state, histogram, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CHECKED: tl.constexpr,
    WHOLE: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)
    base = tl.zeros([CHUNK], STORED)
    if HAS_BASE:
        base = load(tl.load(row + BASE), begin, lanes, count, STORED, STORED, WHOLE)
    copy = (tl.program_id(0) % COPIES) * num_tasks
    for t in range(num_tasks):
        expert = state + t * FIELDS
        lowest, highest = tl.load(expert + THRESHOLD), tl.load(expert + LAST)
        if (lowest < highest) | CHECKED:
            x = load(tl.load(row + EXPERTS + t), begin, lanes, count, STORED, STORED, WHOLE)
            tau = task_vector(x, base, HAS_BASE, DROP).to(COMPUTE)
            key = key_of(tau)
            if not WHOLE:
                key = tl.where(lanes < count, key, -1)
            first, last, shift = lowest.to(key.dtype), highest.to(key.dtype), tl.load(expert + SHIFT).to(key.dtype)
            bins = histogram + (copy + t) * BINS
            # The ends of a range often are values that many keys share: they are counted apart. Two counts fit a sum.
            above = tl.sum((key > last).to(tl.int32) + ((key == last).to(tl.int32) << 16))
            below = (key == first).to(tl.int32)
            if CHECKED:
                below += tl.where(is_finite(tau), 0, 1 << 16)
            below = tl.sum(below)
            if lowest < highest:
                one = tl.full([CHUNK], 1, tl.int64)
                tl.atomic_add(bins + ((key - first) >> shift), one, mask=(key > first) & (key < last), sem="relaxed")
                tl.atomic_add(bins, (below & 0xFFFF).to(tl.int64), sem="relaxed")
                tl.atomic_add(bins + ((highest - lowest) >> shift), (above >> 16).to(tl.int64), sem="relaxed")
                tl.atomic_add(expert + ABOVE, (above & 0xFFFF).to(tl.int64), sem="relaxed")
            if CHECKED:  # noqa: SIM102
                if below >> 16 > 0:
                    tl.atomic_add(nonfinite, (below >> 16).to(tl.int64), sem="relaxed")


@triton.jit
def _descend(
    state, histogram,
    LARGEST: tl.constexpr, SPARE: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Narrows the range of this program's expert, and clears its histogram.

    Every thread reads what one thread writes: all of it is read before the sums, where threads wait for one another.
    """
    t = tl.program_id(0)
    expert = state + t * FIELDS
    first, last, shift = tl.load(expert + THRESHOLD), tl.load(expert + LAST), tl.load(expert + SHIFT)
    rank = tl.load(expert + KEEP) - tl.load(expert + ABOVE)
    if first < last:
        lanes = tl.arange(0, BINS)
        copies = histogram + (tl.arange(0, COPIES)[:, None] * tl.num_programs(0) + t) * BINS + lanes[None, :]
        counts = tl.sum(tl.load(copies), axis=0)
        inside = tl.sum(counts)
        over = inside - tl.cumsum(counts)  # keys in higher bins
        here = (over < rank) & (rank <= over + counts)
        low = first + (tl.sum(tl.where(here, lanes, 0)).to(tl.int64) << shift)
        high = tl.minimum(low + (tl.full([], 1, tl.int64) << shift) - 1, last)
        high = tl.where(shift == SPARE, low, high)
        if rank <= 0:  # the sample's range lies below the threshold
            low = last + (1 << SPARE)
            high = tl.full([], LARGEST, tl.int64)
        if rank > inside:  # above it; two keys at least, or nothing would be counted
            low = tl.zeros([], tl.int64)
            high = tl.maximum(first - 1, 1 << SPARE)
        budget, ties = rank - tl.sum(tl.where(here, over, 0)), tl.sum(tl.where(here, counts, 0))
        tl.debug_barrier()
        tl.store(copies, tl.zeros([COPIES, BINS], tl.int64))
        tl.store(expert + ABOVE, tl.zeros([], tl.int64))
        tl.store(expert + THRESHOLD, low)
        tl.store(expert + LAST, high)
        tl.store(expert + SHIFT, _shift_of(low, high, SPARE, BINS))
        tl.store(expert + BUDGET, budget)
        tl.store(expert + TIES, ties)


def start_from_sample(scope: Scope, state: Tensor, nonfinite: str, bits: int, spare: int) -> None:
    """The first ranges, of all experts whose threshold is open."""
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
        BINS=1 << BIN_BITS, num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip


def narrow(
    scope: Scope, state: Tensor, histogram: Tensor, nonfinite: str, spare: int, finite: FiniteCheck, checked: bool
) -> None:
    """One round: counts the keys of every open expert and narrows its range; checked: counts NaN and infinity, too."""
    counters = {"BINS": 1 << BIN_BITS, "COPIES": COPIES}
    for group in scope.groups:
        _count[(group.num_chunks,)](
            *group.place, scope.num_tasks, state, histogram, finite.found, **group.dtypes, **counters,
            HAS_BASE=scope.has_base, DROP=nonfinite == "drop", CHECKED=checked,
            TASKS=triton.next_power_of_2(scope.num_tasks), CHUNK=CHUNK,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    _descend[(scope.num_tasks,)](
        state, histogram, **counters, LARGEST=LARGEST[scope.compute], SPARE=spare, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
