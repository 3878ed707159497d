"""The rounds of trim: the keys in a range of every expert are counted in a histogram, which narrows the range."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import BASE, CHUNK, EXPERTS, Group, Scope, is_aligned, load, locate_chunk
from .finite import FiniteCheck, is_finite_key, key_of, task_vector

PIECE, LANES = 512, 32  # elements that a warp goes through at a time, each lane through its own
PROGRAMS = 2048  # of a round that may find nothing open
BIN_BITS = 11
COPIES = 4  # of the histogram: a value that many keys share would queue up at one address

# State of an expert, int64. It keeps keys above THRESHOLD, and those equal to it with a flat index below CUT. While its
# range is open THRESHOLD is the lower end and LAST the upper; then TIES keys equal it and BUDGET of them are kept.
# LISTED: how many keys of the range lie in a list, that nothing else need be read; below 0 they lie in none.
THRESHOLD, CUT, LAST, SHIFT, KEEP, ABOVE, BUDGET, TIES, LISTED = (tl.constexpr(field) for field in range(9))
TIE_CHUNK, TIES_LEFT = LAST, SHIFT  # where the tie before CUT is: a chunk of the scope, and its rank there
VARIANCE, SAMPLED = BUDGET, TIES  # of a range from a sample: of the keys above its middle, and of how many keys
FIRST = SHIFT  # of a guess: the range from FIRST to LAST around THRESHOLD; empty where nothing is to be found
FIELDS = tl.constexpr(9)

LARGEST = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}


@triton.jit
def shift_of(first, last, SPARE: tl.constexpr, BINS: tl.constexpr):
    """Keys per bin, as a power of two, where `BINS` bins hold the range."""
    shift = tl.zeros([], tl.int64) + SPARE
    while ((last - first) >> shift) >= BINS:
        shift += 1
    return shift


@triton.jit
def _is_open(state, num_tasks, TASKS: tl.constexpr):
    """Whether any expert is, and whether one of those is not listed."""
    tasks = tl.arange(0, TASKS)
    first = tl.load(state + tasks * FIELDS + THRESHOLD, mask=tasks < num_tasks, other=0)
    last = tl.load(state + tasks * FIELDS + LAST, mask=tasks < num_tasks, other=0)
    listed = tl.load(state + tasks * FIELDS + LISTED, mask=tasks < num_tasks, other=0)
    is_open = first < last
    return tl.max(is_open.to(tl.int32), axis=0) > 0, tl.max((is_open & (listed < 0)).to(tl.int32), axis=0) > 0


@triton.jit
def by_lane(x, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """A column for every lane, of what it has loaded: rows lie in its registers.  # [n] -> [n // LANES, LANES]"""
    rows: tl.constexpr = x.shape[0] // LANES
    x = tl.reshape(x, [rows // VECTOR, LANES, VECTOR])
    return tl.reshape(tl.permute(x, (0, 2, 1)), [rows, LANES])


@triton.jit
def sum_of(x):
    return tl.sum(tl.sum(x, axis=0), axis=0)


@triton.jit
def minus_if_negative(x):
    """-1, else 0: one shift and add where a compare would hold one of seven predicates."""
    if x.dtype == tl.int64:
        sign = (x >> 63).to(tl.int32)
    else:
        sign = x >> 31
    return sign


@triton.jit
def keys_of(
    row, t, base, at, left,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, WHOLE: tl.constexpr,
    PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of a piece of an expert, -1 beyond the end.  # [PIECE // LANES, LANES]"""
    lanes = tl.arange(0, PIECE)
    x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, STORED, WHOLE)
    key = key_of(task_vector(x, base, HAS_BASE, DROP).to(COMPUTE))
    if not WHOLE:
        key = tl.where(lanes < left, key, -1)
    return by_lane(key, 128 // STORED.primitive_bitwidth, LANES)


@triton.jit
def tell_nonfinite(key, nonfinite):
    largest = tl.max(tl.max(key, axis=0), axis=0)
    if not is_finite_key(largest):
        tl.atomic_add(nonfinite, tl.full([], 1, tl.int64), sem="relaxed")


@triton.jit
def add_keys(key, expert, bins):
    """To the histogram of an expert.  # key: [n, LANES]"""
    first, last = tl.load(expert + THRESHOLD).to(key.dtype), tl.load(expert + LAST).to(key.dtype)
    shift = tl.load(expert + SHIFT).to(key.dtype)
    # The first key of a range often is a value that many share: it is counted apart. All counts are sums of signs.
    from_first = key - first
    below, up_to_first = sum_of(minus_if_negative(from_first)), sum_of(minus_if_negative(from_first - 1))
    outside = sum_of(minus_if_negative(from_first | (last - key)))  # below first or above last
    one = tl.full(key.shape, 1, tl.int64)
    behind_first = ((from_first - 1) | (last - key)) >= 0
    tl.atomic_add(bins + (from_first >> shift), one, mask=behind_first, sem="relaxed")
    tl.atomic_add(bins, (below - up_to_first).to(tl.int64), sem="relaxed")
    tl.atomic_add(expert + ABOVE, (below - outside).to(tl.int64), sem="relaxed")


@triton.jit
def piece_of(table, num_parts, columns, piece, CHUNK: tl.constexpr, PIECE: tl.constexpr):
    """Its tensor's row, its first element, and how many there are from there on."""
    _, row, begin, count = locate_chunk(table, num_parts, columns, piece // (CHUNK // PIECE), CHUNK)
    before = piece % (CHUNK // PIECE) * PIECE
    return row, begin + before, count - before


@triton.jit
def _count(
    table, num_parts, columns, num_tasks, state, histogram, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CHECKED: tl.constexpr,
    BINS: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds the keys of this piece to the histograms [COPIES, num_tasks, BINS] of the open experts.

    CHECKED: counts the pieces with NaN or infinity of every expert, too. Bound: reads each expert once.
    """
    histogram += tl.program_id(0) % COPIES * num_tasks * BINS
    row, at, left = piece_of(table, num_parts, columns, tl.program_id(0), CHUNK, PIECE)
    if (left >= PIECE) & is_aligned(row):
        _count_piece(
            row, at, left, num_tasks, state, histogram, nonfinite,
            STORED, COMPUTE, HAS_BASE, DROP, CHECKED, True, BINS, PIECE, LANES,
        )  # fmt: skip
    elif left > 0:
        _count_piece(
            row, at, left, num_tasks, state, histogram, nonfinite,
            STORED, COMPUTE, HAS_BASE, DROP, CHECKED, False, BINS, PIECE, LANES,
        )  # fmt: skip


@triton.jit
def _count_again(
    table, num_parts, columns, num_pieces, num_tasks, state, histogram, lists, capacity,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    LISTS: tl.constexpr, TASKS: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr,
    PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The same of the keys that are left, if any: from lists where LISTS, and by few programs for all pieces."""
    histogram += tl.program_id(0) % COPIES * num_tasks * BINS
    is_open, reads = _is_open(state, num_tasks, TASKS)
    if LISTS:  # noqa: SIM102
        if is_open:
            _count_lists(num_tasks, state, histogram, lists, capacity, BINS, PIECE, LANES)
    if reads:
        for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
            row, at, left = piece_of(table, num_parts, columns, piece, CHUNK, PIECE)
            if left > 0:
                _count_piece(
                    row, at, left, num_tasks, state, histogram, None,
                    STORED, COMPUTE, HAS_BASE, DROP, False, False, BINS, PIECE, LANES,
                )  # fmt: skip


@triton.jit
def _count_lists(
    num_tasks, state, histogram, lists, capacity, BINS: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr
):
    lanes = tl.arange(0, PIECE)
    for t in range(num_tasks):
        expert = state + t * FIELDS
        listed = tl.load(expert + LISTED)
        if tl.load(expert + THRESHOLD) < tl.load(expert + LAST):
            for at in range(tl.program_id(0) * PIECE, listed, tl.num_programs(0) * PIECE):
                key = tl.load(lists + at + lanes, mask=lanes < listed - at, other=-1)
                add_keys(by_lane(key, 128 // key.dtype.primitive_bitwidth, LANES), expert, histogram + t * BINS)
        lists += capacity


@triton.jit
def _count_piece(
    row, at, left, num_tasks, state, histogram, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CHECKED: tl.constexpr,
    WHOLE: tl.constexpr, BINS: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    base = tl.zeros([PIECE], STORED)
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, tl.arange(0, PIECE), left, STORED, STORED, WHOLE)
    for t in range(num_tasks):
        expert = state + t * FIELDS
        reads = (tl.load(expert + THRESHOLD) < tl.load(expert + LAST)) & (tl.load(expert + LISTED) < 0)
        if reads | CHECKED:
            key = keys_of(row, t, base, at, left, STORED, COMPUTE, HAS_BASE, DROP, WHOLE, PIECE, LANES)
            if reads:
                add_keys(key, expert, histogram + t * BINS)
            if CHECKED:
                tell_nonfinite(key, nonfinite)


@triton.jit
def above_range(last, LARGEST: tl.constexpr, SPARE: tl.constexpr):
    """Where a threshold is that a sample's range misses; two keys at least, or nothing would be counted."""
    second_largest: tl.constexpr = (LARGEST >> SPARE << SPARE) - (1 << SPARE)
    return tl.minimum(last + (1 << SPARE), second_largest), tl.full([], LARGEST, tl.int64)


@triton.jit
def below_range(first, SPARE: tl.constexpr):
    return tl.zeros([], tl.int64), tl.maximum(first - 1, 1 << SPARE)


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
        if rank <= 0:
            low, high = above_range(last, LARGEST, SPARE)
        if rank > inside:
            low, high = below_range(first, SPARE)
        budget, ties = rank - tl.sum(tl.where(here, over, 0)), tl.sum(tl.where(here, counts, 0))
        tl.debug_barrier()
        tl.store(copies, tl.zeros([COPIES, BINS], tl.int64))
        tl.store(expert + ABOVE, tl.zeros([], tl.int64))
        tl.store(expert + THRESHOLD, low)
        tl.store(expert + LAST, high)
        tl.store(expert + SHIFT, shift_of(low, high, SPARE, BINS))
        tl.store(expert + BUDGET, budget)
        tl.store(expert + TIES, ties)


def pieces_of(group: Group) -> int:
    return group.num_chunks * (CHUNK // PIECE)


def narrow(
    scope: Scope, state: Tensor, histogram: Tensor, lists: Tensor | None, nonfinite: str, spare: int,
    finite: FiniteCheck, first: bool,
) -> None:  # fmt: skip
    """One round; first: something is open, and NaN and infinity are looked for too."""
    counters = {"BINS": 1 << BIN_BITS, "COPIES": COPIES}
    options = {
        "HAS_BASE": scope.has_base, "DROP": nonfinite == "drop", "CHUNK": CHUNK, "PIECE": PIECE, "LANES": LANES,
        "num_warps": 1, "enable_fp_fusion": False,
    }  # fmt: skip
    capacity = 0 if lists is None else lists.shape[1]
    for i, group in enumerate(scope.groups):
        pieces = pieces_of(group)
        if first:
            _count[(pieces,)](
                *group.place, scope.num_tasks, state, histogram, finite.found, **group.dtypes, **counters, **options,
                CHECKED=finite.wanted,
            )  # fmt: skip
        else:
            _count_again[(min(pieces, PROGRAMS),)](
                *group.place, pieces, scope.num_tasks, state, histogram, lists, capacity, **group.dtypes, **counters,
                **options, LISTS=lists is not None and i == 0, TASKS=triton.next_power_of_2(scope.num_tasks),
            )  # fmt: skip
    _descend[(scope.num_tasks,)](
        state, histogram, **counters, LARGEST=LARGEST[scope.compute], SPARE=spare, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
