"""A block of parameters merged by TIES: what every expert brings, the election, the merge, and its rounding."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .addresses import BASE, EXPERTS, NUMEL, OUT, divide, load, store
from .finite import key_of, task_vector
from .ties_keep import COUNTED, base_unless_enough, narrowed
from .ties_pairs import above_limit, counted, load_pairs, subtracted, votes_of, widened
from .trim_rounds import CUT, FIELDS, FIRST, LAST, THRESHOLD, minus_if_negative


@triton.jit
def _limit_keys(limits, t, COMPUTE: tl.constexpr):
    """Of what keeps ties and of what does not: never negative, as 0 adds nothing, and never NaN."""
    threshold = tl.load(limits + t * FIELDS + THRESHOLD)
    infinity = tl.full([], float("inf"), COMPUTE)
    if COMPUTE == tl.float64:  # noqa: SIM300
        infinity = infinity.to(tl.int64, bitcast=True)
    else:
        threshold, infinity = threshold.to(tl.int32), infinity.to(tl.int32, bitcast=True)
    return tl.maximum(tl.minimum(threshold - 1, infinity), 0), tl.minimum(threshold, infinity)


@triton.jit
def _before_cut(limits, t, flat, BLOCK: tl.constexpr):
    """How many elements of a block."""
    return tl.minimum(tl.maximum(tl.load(limits + t * FIELDS + CUT) - flat, 0), BLOCK).to(tl.int32)


@triton.jit
def limits_of(limits, t, flat, lanes, COMPUTE: tl.constexpr, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """The magnitudes above which entries are kept."""
    with_ties, without = _limit_keys(limits, t, COMPUTE)
    if CUTS:
        is_before = lanes < _before_cut(limits, t, flat, BLOCK)
        return tl.where(is_before, with_ties, without).to(COMPUTE, bitcast=True)
    else:
        return with_ties.to(COMPUTE, bitcast=True)


@triton.jit
def _limit_pairs(limits, t, flat, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """The same for pairs of bfloat16; what is cut off of a limit lies between two of them."""
    with_ties, without = _limit_keys(limits, t, tl.float32)
    low, high = with_ties, with_ties
    if CUTS:
        before_cut = _before_cut(limits, t, flat, BLOCK)
        lanes = 2 * tl.arange(0, BLOCK // 2)
        low = tl.where(lanes < before_cut, with_ties, without)
        high = tl.where(lanes + 1 < before_cut, with_ties, without)
    return (low >> 16) | (high & -0x10000)


@triton.jit
def is_above(x, limit):
    """By magnitude, where NaN is above all."""
    return ~(tl.abs(x) <= limit)


@triton.jit
def _sign_bit(x):
    """-1 where it is set, else 0."""
    if x.dtype == tl.float64:
        bits = (x.to(tl.int64, bitcast=True) >> 63).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True) >> 31
    return bits


@triton.jit
def _entry(
    row, part, t, num_tasks, base, at, lanes, left, flat, limits, numbers, rescales, keep,
    RULE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_RESCALES: tl.constexpr, KEEP: tl.constexpr,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    CUTS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What an expert brings to the election and to the sum, 0 unless that is kept, whether it is, and its key."""
    x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, STORED, WHOLE)
    tau = task_vector(x, base, HAS_BASE, DROP).to(COMPUTE)
    key = key_of(tau)
    kept = is_above(tau, limits_of(limits, t, flat, lanes, COMPUTE, CUTS, BLOCK))
    if KEEP != 0:
        kept = narrowed(kept, key, keep, part, num_tasks, t, at, flat, lanes, left, COMPUTE, KEEP, WHOLE, BLOCK)
    if (RULE == "exact" or RULE == "exact_all" or RULE == "magmax") and HAS_BASE:
        tau = x.to(COMPUTE) - base.to(COMPUTE)
    if RULE != "paper" and RULE != "paper_max" and RULE != "peft":
        if HAS_RESCALES:
            tau = (tau * tl.load(rescales + t).to(COMPUTE)).to(ROUNDED).to(COMPUTE)
        if HAS_WEIGHTS:
            tau = (tau * tl.load(numbers + 2 + t).to(COMPUTE)).to(ROUNDED).to(COMPUTE)
    tau = tl.where(kept, tau, 0.0)
    summed = tau
    if RULE == "peft" and HAS_WEIGHTS:
        summed = tau * tl.load(numbers + 2 + t).to(COMPUTE)
    return tau, summed, kept, key


@triton.jit
def range_of(limits, t, like):
    """The first and the last key of the range that holds an expert's threshold, by the guess that `limits` are."""
    expert = limits + t * FIELDS
    return tl.load(expert + FIRST).to(like.dtype), tl.load(expert + LAST).to(like.dtype)


@triton.jit
def _elect(total, positives, negatives, RULE: tl.constexpr, ELECT: tl.constexpr):
    """Where plus and minus are elected, and where neither; but for the paper a draw elects plus."""
    mass = total
    if ELECT == "count":
        mass = (positives - negatives).to(total.dtype)
    plus, minus = mass > 0, mass < 0
    drawn = ~(plus | minus)
    if RULE == "mergekit" or RULE == "peft" or RULE == "exact":
        plus = ~minus
    return plus, minus, drawn


@triton.jit
def signs_and_draws(elections):
    """The elected signs' sum and the draws' count, of the sum over some blocks of a chunk: both fit into 16 bits."""
    both = tl.sum(elections, axis=0)
    signs = both << 16 >> 16
    return signs, (both - signs) >> 16


@triton.jit
def _finish(
    total, positive, negative, positives, negatives, positive_weight, negative_weight, plus, minus, base, lam,
    RULE: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    ROUNDED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    # Draws without a sign sum the negative entries, as the official code does; its max multiplies by the sign, 0.
    merged = tl.where(plus, positive, negative)
    if RULE == "paper_max":
        merged = tl.where(plus | minus, merged, 0.0)
    if RULE != "peft":
        merged = merged.to(ROUNDED).to(COMPUTE)
    if DIVIDE:
        if (RULE == "mergekit" or RULE == "exact") and HAS_WEIGHTS:
            divisor = tl.where(plus, positive_weight, negative_weight).to(ROUNDED).to(COMPUTE)
            divisor = tl.where(divisor == 0, 1.0, divisor)
        else:
            divisor = tl.maximum(tl.where(plus, positives, negatives), 1).to(COMPUTE)
        merged = divide(merged, divisor)
        if RULE == "mergekit":
            merged = merged.to(ROUNDED).to(COMPUTE)
    merged = merged * lam
    if RULE == "mergekit" or RULE == "paper_max" or (RULE == "paper" and not DIVIDE):
        merged = merged.to(ROUNDED).to(COMPUTE)
    if HAS_BASE:
        merged = base + merged
    return tl.where(total == total, merged, total)  # a NaN among the kept entries reaches the output


@triton.jit
def _finish_all(
    total, weight, alone, kept_count, base, numbers,
    RULE: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_UNIQUE: tl.constexpr,
    ROUNDED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """Without an election: all entries, as mergekit rounds their sum, or rounded once."""
    merged = total.to(ROUNDED).to(COMPUTE)
    if DIVIDE and RULE == "mergekit_all":
        divisor = tl.load(numbers + 1).to(COMPUTE) + tl.zeros_like(merged)
        merged = divide(merged, divisor).to(ROUNDED).to(COMPUTE)
    if DIVIDE and RULE == "exact_all":
        divisor = kept_count.to(COMPUTE)
        if HAS_WEIGHTS:
            divisor = weight
        merged = divide(merged, tl.where(divisor == 0, 1.0, divisor))
        if HAS_UNIQUE:
            merged = tl.where(kept_count > 1, merged, alone)
    merged = (merged * tl.load(numbers).to(COMPUTE)).to(ROUNDED).to(COMPUTE)
    if HAS_BASE:
        merged = base + merged
    return merged


@triton.jit
def merge_block(
    row, part, at, left, flat, lanes, num_tasks, limits, numbers, rescales, unique_scales, keep, draw_sign,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, HAS_UNIQUE: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr,
    HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Merges, or where SPLIT stores the entries that agree. Gives the elections for `signs_and_draws`.

    The elements are at + lanes, of which at and left may be one for each. NEAR: a power of two, as many as there are
    experts or more: gives the experts whose keys lie in the ranges of a guess as bits, the last expert's lowest; how
    many keys of every expert lie above; and the largest key.  # int32 [BLOCK], int32 [NEAR], [BLOCK]
    """
    zeros = tl.zeros([BLOCK], COMPUTE)
    # What is kept is not 0 unless it was scaled. A kept NaN may count as negative: it elects nobody and is the result.
    BY_SIGN_BIT: tl.constexpr = ELECT != "count" and not (HAS_RESCALES or (HAS_WEIGHTS and RULE != "peft"))
    UNSCALED: tl.constexpr = (
        BY_SIGN_BIT and not HAS_WEIGHTS and (RULE == "paper" or RULE == "mergekit" or RULE == "peft")
    )
    PAIRED: tl.constexpr = (
        PAIRS != "" and UNSCALED and WHOLE and tl.bfloat16 == STORED and KEEP == 0 and NEAR == 0 and not SPLIT
        and not DROP
    )  # fmt: skip
    base = zeros.to(STORED)
    base_pairs = tl.zeros([BLOCK // 2], tl.int32)
    if HAS_BASE:
        if PAIRED:
            base_pairs = load_pairs(tl.load(row + BASE), at, BLOCK)
            base = widened(base_pairs)
        else:
            base = load(tl.load(row + BASE), at, lanes, left, STORED, STORED, WHOLE)
    votes = tl.zeros([BLOCK // 2], tl.int32)
    total, positive, negative, positive_weight, negative_weight = zeros, zeros, zeros, zeros, zeros
    positives = tl.zeros([BLOCK], tl.int32)
    negatives, kept_count, alone = positives, positives, zeros
    tasks = tl.arange(0, NEAR if NEAR > 0 else 1)
    outside, above, largest = positives - 1, tl.zeros_like(tasks), key_of(zeros)
    for t in tl.range(num_tasks, loop_unroll_factor=TOGETHER):
        if PAIRED:
            pairs = load_pairs(tl.load(row + EXPERTS + t), at, BLOCK)
            if HAS_BASE:
                pairs = subtracted(pairs, base_pairs, PAIRS)
            kept_pairs = above_limit(pairs, _limit_pairs(limits, t, flat, CUTS, BLOCK), PAIRS)
            pairs &= kept_pairs
            votes += votes_of(pairs, kept_pairs, PAIRS)
            elected = widened(pairs)
            total = total + elected
            positive = tl.where(elected > 0, positive + elected, positive)
            negative = tl.where(elected > 0, negative, negative + elected)
        else:
            elected, summed, kept, key = _entry(
                row, part, t, num_tasks, base, at, lanes, left, flat, limits, numbers, rescales, keep,
                RULE, HAS_WEIGHTS, HAS_RESCALES, KEEP, STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, WHOLE, BLOCK,
            )  # fmt: skip
            if NEAR > 0:
                first, last = range_of(limits, t, key)
                outside = (outside << 1) - minus_if_negative((key - first) | (last - key))
                above = tl.where(tasks == t, above - tl.sum(minus_if_negative(last - key), axis=0), above)
                largest = tl.maximum(largest, key)
            up, down = elected > 0, elected < 0
            kept_count += kept.to(tl.int32)
            if RULE == "magmax":  # the last of equal ones; NaN has the largest key
                total = tl.where(kept & (key_of(total) <= key_of(summed)), summed, total)
            else:
                total = total + elected
            if HAS_UNIQUE:
                alone = alone + tl.where(kept, summed * tl.load(unique_scales + t).to(COMPUTE), 0.0)
            if RULE == "paper_max":
                positive = tl.where(up & ~(positive > summed), summed, positive)
                negative = tl.where(down & ~(summed > negative), summed, negative)
            elif RULE == "peft" and HAS_WEIGHTS:
                positive = positive + tl.where(up, summed, 0.0)
                negative = negative + tl.where(down, summed, 0.0)
            else:  # where the two are one; a NaN may go where it likes, as it is the result
                positive = tl.where(up, positive + elected, positive)
                negative = tl.where(up, negative, negative + elected)
            if BY_SIGN_BIT:
                negatives -= _sign_bit(elected)
            else:
                positives += up.to(tl.int32)
                negatives += down.to(tl.int32)
            if (RULE == "mergekit" or RULE == "exact") and HAS_WEIGHTS:
                weight = tl.load(numbers + 2 + t).to(COMPUTE)
                positive_weight = positive_weight + tl.where(up, weight, 0.0)
                negative_weight = negative_weight + tl.where(down, weight, 0.0)
            if RULE == "exact_all" and HAS_WEIGHTS:
                positive_weight = positive_weight + tl.where(kept, tl.load(numbers + 2 + t).to(COMPUTE), 0.0)
    if PAIRED:
        kept_count, negatives = counted(votes)
    if BY_SIGN_BIT:
        positives = kept_count - negatives
    plus, minus, drawn = _elect(total, positives, negatives, RULE, ELECT)
    sign_or_draw = tl.where(minus, -1, tl.where(drawn & (positives > 0), 1 << 16, 0))
    VECTOR: tl.constexpr = 128 // STORED.primitive_bitwidth
    elections = tl.sum(tl.reshape(tl.where(plus, 1, sign_or_draw), [BLOCK // VECTOR, VECTOR]), axis=1)
    if RULE == "paper" or RULE == "paper_max":
        plus, minus = plus | (drawn & (draw_sign > 0)), minus | (drawn & (draw_sign < 0))
    if SPLIT:
        numel = tl.load(row + NUMEL)
        if ALIGNED_ROWS:
            numel = tl.multiple_of(numel, 16)
        for t in range(num_tasks):
            elected, summed, kept, _ = _entry(
                row, part, t, num_tasks, base, at, lanes, left, flat, limits, numbers, rescales, keep,
                RULE, HAS_WEIGHTS, HAS_RESCALES, KEEP, STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, WHOLE, BLOCK,
            )  # fmt: skip
            # a NaN total elects nobody; its entries stay visible
            visible = tl.where(plus, elected > 0, elected < 0) | (kept & (total != total))
            if RULE == "mergekit_all" or RULE == "exact_all":
                visible = kept
            agreeing = tl.where(visible, summed, 0.0)
            store(agreeing, tl.load(row + OUT), t * numel + at, lanes, left, STORED, WHOLE and ALIGNED_ROWS)
    else:
        base = base.to(COMPUTE)
        if RULE == "mergekit_all" or RULE == "exact_all" or RULE == "magmax":
            merged = _finish_all(
                total, positive_weight, alone, kept_count, base, numbers,
                RULE, DIVIDE, HAS_WEIGHTS, HAS_UNIQUE, ROUNDED, COMPUTE, HAS_BASE,
            )  # fmt: skip
        else:
            lam = tl.load(numbers).to(COMPUTE)
            merged = _finish(
                total, positive, negative, positives, negatives, positive_weight, negative_weight, plus, minus, base,
                lam, RULE, DIVIDE, HAS_WEIGHTS, ROUNDED, COMPUTE, HAS_BASE,
            )  # fmt: skip
        if COUNTED & KEEP:
            merged = base_unless_enough(merged, base, kept_count, keep)
        store(merged, tl.load(row + OUT), at, lanes, left, STORED, WHOLE)
    near = ~outside
    if not WHOLE:
        near = tl.where(lanes < left, near, 0)
    return elections, near, above, largest
