"""TIES on CUDA tensors: trim, elect, disjoint merge, scale, add to base and round, fused.

Each input is read once after the trim. The sums of the positive and of the negative entries are kept side by side, so
that the election needs no second look at the experts. Under "paper" a drawn election takes the sign of the sum of all
elected signs, known at the end: the merge assumes plus, and a second launch merges the chunks with draws again where
that was wrong.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from .addresses import (
    BASE,
    CHUNK,
    EXPERTS,
    FIRST_CHUNK,
    NUMEL,
    OFFSET,
    OUT,
    Group,
    Scope,
    divide,
    is_capturing,
    load,
    locate,
    store,
    upload,
)
from .finite import FiniteCheck, key_of, task_vector
from .trim import CUT, FIELDS, LARGEST, THRESHOLD, check_one_tensor, trim

BLOCK_BYTES = 2048  # of a tensor, read together: 16 for each of 128 threads
SUMS_AT_ONCE = 1024  # chunks of a tensor whose norms are added up together
SMALLEST_DIVISOR = 1e-8  # below it mergekit does not divide


@triton.jit
def _limits_of(limits, t, flat, lanes, COMPUTE: tl.constexpr, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """The keys above which entries are kept: never negative, as 0 adds nothing, and never NaN."""
    threshold = tl.load(limits + t * FIELDS + THRESHOLD)
    if COMPUTE == tl.float64:  # noqa: SIM300
        infinity = tl.full([], 0x7FF0000000000000, tl.int64)
        with_ties = tl.maximum(tl.minimum(threshold - 1, infinity), 0)
        without = tl.minimum(threshold, infinity)
    else:
        with_ties = tl.maximum(tl.minimum(threshold - 1, 0x7F800000), 0).to(tl.int32)
        without = tl.minimum(threshold, 0x7F800000).to(tl.int32)
    if CUTS:
        before_cut = tl.minimum(tl.maximum(tl.load(limits + t * FIELDS + CUT) - flat, 0), BLOCK).to(tl.int32)
        return tl.where(lanes < before_cut, with_ties, without)
    else:
        return with_ties


@triton.jit
def _entry(
    row, t, base, at, lanes, left, flat, limits, numbers, rescales,
    RULE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_RESCALES: tl.constexpr,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What an expert brings to the election and to the sum, and whether that is kept, positive, negative."""
    x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, COMPUTE, WHOLE, ALIGNED)
    tau = task_vector(x, base, STORED, HAS_BASE, DROP)
    limit = _limits_of(limits, t, flat, lanes, COMPUTE, CUTS, BLOCK)
    kept = key_of(tau) > limit
    summed = tau
    if RULE == "mergekit" or RULE == "mergekit_all":
        if HAS_RESCALES:
            tau = (tau * tl.load(rescales + t).to(COMPUTE)).to(STORED).to(COMPUTE)
        if HAS_WEIGHTS:
            tau = (tau * tl.load(numbers + 2 + t).to(COMPUTE)).to(STORED).to(COMPUTE)
        summed = tau
    if RULE == "peft" and HAS_WEIGHTS:
        summed = tau * tl.load(numbers + 2 + t).to(COMPUTE)
    return tau, summed, kept, kept & (tau > 0), kept & (tau < 0)


@triton.jit
def _elect(total, positives, negatives, RULE: tl.constexpr, ELECT: tl.constexpr):
    """Where plus and minus are elected, and where neither; under mergekit and PEFT a draw elects plus."""
    mass = total
    if ELECT == "count":
        mass = (positives - negatives).to(total.dtype)
    plus, minus = mass > 0, mass < 0
    drawn = ~(plus | minus)
    if RULE == "mergekit" or RULE == "peft":
        plus = ~minus
    return plus, minus, drawn


@triton.jit
def _finish(
    total, positive, negative, positives, negatives, positive_weight, negative_weight, plus, minus, base, lam,
    RULE: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    # Draws without a sign sum the negative entries, as the official code does; its max multiplies by the sign, 0.
    merged = tl.where(plus, positive, negative)
    if RULE == "paper_max":
        merged = tl.where(plus | minus, merged, 0.0)
    if RULE != "peft":
        merged = merged.to(STORED).to(COMPUTE)
    if DIVIDE:
        if RULE == "mergekit" and HAS_WEIGHTS:
            divisor = tl.where(plus, positive_weight, negative_weight).to(STORED).to(COMPUTE)
        else:
            divisor = tl.where(plus, positives, negatives).to(COMPUTE)
        merged = divide(merged, tl.where(divisor == 0, 1.0, divisor))
        if RULE == "mergekit":
            merged = merged.to(STORED).to(COMPUTE)
    merged = merged * lam
    if RULE == "mergekit" or RULE == "paper_max" or (RULE == "paper" and not DIVIDE):
        merged = merged.to(STORED).to(COMPUTE)
    if HAS_BASE:
        merged = base + merged
    return tl.where(total == total, merged, total)  # a NaN among the kept entries reaches the output


@triton.jit
def _finish_all(
    total, base, numbers,
    DIVIDE: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    """The sum of all entries, as mergekit rounds it without an election."""
    merged = total.to(STORED).to(COMPUTE)
    if DIVIDE:
        divisor = tl.load(numbers + 1).to(COMPUTE) + tl.zeros_like(merged)
        merged = divide(merged, divisor).to(STORED).to(COMPUTE)
    merged = (merged * tl.load(numbers).to(COMPUTE)).to(STORED).to(COMPUTE)
    if HAS_BASE:
        merged = base + merged
    return merged


@triton.jit
def _merge_block(
    row, at, left, flat, num_tasks, limits, numbers, rescales, draw_sign,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, SPLIT: tl.constexpr, ALIGNED_ROWS: tl.constexpr,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Merges, or where SPLIT stores the entries that agree. Gives the elected signs' sum and the draws' count."""
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], COMPUTE)
    base = zeros
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, WHOLE, ALIGNED)
    total, positive, negative, positive_weight, negative_weight = zeros, zeros, zeros, zeros, zeros
    positives = tl.zeros([BLOCK], tl.int32)
    negatives = positives
    for t in tl.range(num_tasks, loop_unroll_factor=TOGETHER):
        elected, summed, kept, up, down = _entry(
            row, t, base, at, lanes, left, flat, limits, numbers, rescales,
            RULE, HAS_WEIGHTS, HAS_RESCALES, STORED, COMPUTE, HAS_BASE, DROP, CUTS, WHOLE, ALIGNED, BLOCK,
        )  # fmt: skip
        total = total + tl.where(kept, elected, 0.0)
        if RULE == "paper_max":
            positive = tl.where(up & ~(positive > summed), summed, positive)
            negative = tl.where(down & ~(summed > negative), summed, negative)
        else:
            positive = positive + tl.where(up, summed, 0.0)
            negative = negative + tl.where(down, summed, 0.0)
        positives += up.to(tl.int32)
        negatives += down.to(tl.int32)
        if RULE == "mergekit" and HAS_WEIGHTS:
            weight = tl.load(numbers + 2 + t).to(COMPUTE)
            positive_weight = positive_weight + tl.where(up, weight, 0.0)
            negative_weight = negative_weight + tl.where(down, weight, 0.0)
    plus, minus, drawn = _elect(total, positives, negatives, RULE, ELECT)
    sign_sum = tl.sum(plus.to(tl.int32) - minus.to(tl.int32))
    draws = tl.sum((drawn & (positives > 0)).to(tl.int32))
    if RULE == "paper" or RULE == "paper_max":
        plus, minus = plus | (drawn & (draw_sign > 0)), minus | (drawn & (draw_sign < 0))
    if SPLIT:
        numel = tl.load(row + NUMEL)
        if ALIGNED_ROWS:
            numel = tl.multiple_of(numel, 16)
        for t in range(num_tasks):
            elected, summed, kept, up, down = _entry(
                row, t, base, at, lanes, left, flat, limits, numbers, rescales,
                RULE, HAS_WEIGHTS, HAS_RESCALES, STORED, COMPUTE, HAS_BASE, DROP, CUTS, WHOLE, ALIGNED, BLOCK,
            )  # fmt: skip
            # a NaN total elects nobody; its entries stay visible
            visible = tl.where(plus, up, down) | (kept & (total != total))
            if RULE == "mergekit_all":
                visible = kept
            agreeing = tl.where(visible, summed, 0.0)
            store(agreeing, tl.load(row + OUT), t * numel + at, lanes, left, STORED, WHOLE, ALIGNED and ALIGNED_ROWS)
    elif RULE == "mergekit_all":
        merged = _finish_all(total, base, numbers, DIVIDE, STORED, COMPUTE, HAS_BASE)
        store(merged, tl.load(row + OUT), at, lanes, left, STORED, WHOLE, ALIGNED)
    else:
        lam = tl.load(numbers).to(COMPUTE)
        merged = _finish(
            total, positive, negative, positives, negatives, positive_weight, negative_weight, plus, minus, base, lam,
            RULE, DIVIDE, HAS_WEIGHTS, STORED, COMPUTE, HAS_BASE,
        )  # fmt: skip
        store(merged, tl.load(row + OUT), at, lanes, left, STORED, WHOLE, ALIGNED)
    return sign_sum, draws


@triton.jit
def _merge(
    table, num_parts, columns, num_tasks, limits, numbers, rescales, nonfinite, sign_sum, draws,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, SPLIT: tl.constexpr, ALIGNED_ROWS: tl.constexpr,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr,
    CHECKED: tl.constexpr, AGAIN: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """AGAIN: only the chunks with draws, under the sign that `sign_sum` has turned out to have."""
    if CHECKED:  # noqa: SIM102  # there is no pointer to load from otherwise
        if tl.load(nonfinite) != 0:
            return
    draw_sign = 1
    if AGAIN:
        sum_of_all = tl.load(sign_sum)
        if (sum_of_all > 0) | (tl.load(draws + tl.program_id(0)) == 0):
            return
        draw_sign = tl.where(sum_of_all < 0, -1, 0)
    part, row, begin, count = locate(table, num_parts, columns, CHUNK)
    flat = tl.load(row + OFFSET) + begin
    if HAS_RESCALES:
        rescales += part * num_tasks
    signs = tl.zeros([], tl.int32)
    draws_here = signs
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        signs_of_block, draws_of_block = _merge_block(
            row, begin + at, BLOCK, flat + at, num_tasks, limits, numbers, rescales, draw_sign,
            RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, HAS_BASE, DROP, CUTS, True, ALIGNED, BLOCK, TOGETHER,
        )  # fmt: skip
        signs += signs_of_block
        draws_here += draws_of_block
    if whole < count:
        signs_of_block, draws_of_block = _merge_block(
            row, begin + whole, count - whole, flat + whole, num_tasks, limits, numbers, rescales, draw_sign,
            RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, HAS_BASE, DROP, CUTS, False, ALIGNED, BLOCK, TOGETHER,
        )  # fmt: skip
        signs += signs_of_block
        draws_here += draws_of_block
    if (RULE == "paper" or RULE == "paper_max") and not AGAIN:
        tl.atomic_add(sign_sum, signs.to(tl.int64), sem="relaxed")
        tl.store(draws + tl.program_id(0), draws_here)


@triton.jit
def _norms(
    table, num_parts, columns, num_tasks, limits, norms, group_chunks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """L1 norms of a chunk of every task vector, before and after the trim.  # norms: [2, num_tasks, group_chunks]"""
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    flat = tl.load(row + OFFSET) + begin
    norms += tl.program_id(0)
    if count == CHUNK:
        _norms_of_chunk(
            row, begin, count, flat, num_tasks, limits, norms, group_chunks,
            STORED, COMPUTE, HAS_BASE, DROP, True, ALIGNED, CHUNK,
        )  # fmt: skip
    else:
        _norms_of_chunk(
            row, begin, count, flat, num_tasks, limits, norms, group_chunks,
            STORED, COMPUTE, HAS_BASE, DROP, False, ALIGNED, CHUNK,
        )  # fmt: skip


@triton.jit
def _norms_of_chunk(
    row, begin, count, flat, num_tasks, limits, norms, group_chunks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)
    base = tl.zeros([CHUNK], COMPUTE)
    if HAS_BASE:
        base = load(tl.load(row + BASE), begin, lanes, count, STORED, COMPUTE, WHOLE, ALIGNED)
    for t in range(num_tasks):
        x = load(tl.load(row + EXPERTS + t), begin, lanes, count, STORED, COMPUTE, WHOLE, ALIGNED)
        tau = task_vector(x, base, STORED, HAS_BASE, DROP)
        kept = key_of(tau) > _limits_of(limits, t, flat, lanes, COMPUTE, True, CHUNK)
        magnitude = tl.abs(tau).to(tl.float64)
        tl.store(norms + t * group_chunks, tl.sum(magnitude))
        tl.store(norms + (num_tasks + t) * group_chunks, tl.sum(tl.where(kept, magnitude, 0.0)))


@triton.jit
def _sum_of_chunks(norms, first, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        lanes = at + tl.arange(0, BLOCK)
        total += tl.load(norms + first + lanes, mask=lanes < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _rescale(
    table, columns, num_tasks, norms, group_chunks, rescales,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The factor that gives a trimmed task vector of one tensor its norm back.  # rescales: [num_parts, num_tasks]"""
    part, t = tl.program_id(0), tl.program_id(1)
    row = table + part.to(tl.int64) * columns
    first, count = tl.load(row + FIRST_CHUNK), (tl.load(row + NUMEL) + CHUNK - 1) // CHUNK
    norm_before = _sum_of_chunks(norms + t * group_chunks, first, count, BLOCK)
    norm_after = _sum_of_chunks(norms + (num_tasks + t) * group_chunks, first, count, BLOCK)
    before, after = norm_before.to(COMPUTE).to(STORED).to(COMPUTE), norm_after.to(COMPUTE).to(STORED).to(COMPUTE)
    small = tl.full([], 1e-7, tl.float64).to(COMPUTE)
    # A norm past the dtype's range would make the ratio NaN; the norms themselves are fine.
    infinite = (before == float("inf")) | (after == float("inf"))
    ratio = tl.where(infinite, (norm_before / norm_after).to(COMPUTE), divide(before, after))
    factor = tl.where((before < small) | (after < small), 1.0, ratio.to(STORED).to(COMPUTE))
    tl.store(rescales + part * num_tasks + t, factor)


class Merger:
    """The options of TIES, checked, and the launches they ask for."""

    def __init__(
        self,
        num_tasks: int,
        *,
        density: Sequence[float],
        lam: float = 1.0,
        weights: Sequence[float] | None,
        semantics: str,
        elect: str,
        reduce: str = "sum",
        normalize: bool = True,
        rescale: bool,
        nonfinite: str,
        thresholds: Tensor | None,
        cuts: Sequence[int] | None = None,
    ) -> None:
        arguments.check_one_of("semantics", semantics, arguments.SEMANTICS)
        arguments.check_one_of("elect", elect, arguments.ELECT)
        arguments.check_one_of("reduce", reduce, arguments.REDUCE)
        with_semantics = f"with semantics={semantics!r}, got"
        if reduce == "max" and semantics != "paper":
            raise RuntimeError(f"reduce must be 'mean' or 'sum' {with_semantics} 'max'")
        if elect == "none" and semantics != "mergekit":
            raise RuntimeError(f"elect must be 'sum' or 'count' {with_semantics} 'none'")
        if semantics != "mergekit" and (rescale or not normalize):
            raise RuntimeError(f"normalize and rescale must keep their defaults {with_semantics} others")
        if weights is not None and len(weights) != num_tasks:
            raise RuntimeError(f"weights must be one per expert, got {len(weights)}")
        if weights is not None and semantics == "paper":
            raise RuntimeError("weights must be None with semantics='paper', got weights")
        if cuts is not None and thresholds is None:
            raise RuntimeError("thresholds must be given where cuts are, got none")
        if cuts is not None and len(cuts) != num_tasks:
            raise RuntimeError(f"cuts must be one per expert, got {len(cuts)}")
        self.density, self.lam, self.weights, self.semantics = density, lam, weights, semantics
        self.nonfinite, self.thresholds, self.cuts, self.rescale = nonfinite, thresholds, cuts, rescale
        rules = {"paper": "paper_max" if reduce == "max" else "paper", "mergekit": "mergekit", "peft": "peft"}
        self.rule = "mergekit_all" if elect == "none" else rules[semantics]
        self.options: dict[str, Any] = {
            "RULE": self.rule,
            "ELECT": elect,
            "DIVIDE": reduce == "mean" and normalize,
            "HAS_WEIGHTS": weights is not None,
            "HAS_RESCALES": rescale,
        }

    def numbers(self, dtype: torch.dtype) -> list[float]:
        """lam, the divisor without an election, and the weights, as exactly as they are used."""
        compute = torch.promote_types(dtype, torch.float32)
        stored = dtype if self.semantics == "mergekit" else torch.float32
        weights = torch.tensor(self.weights or [1.0] * len(self.density), dtype=compute).to(stored).to(compute)
        total = torch.zeros_like(weights[0])
        for weight in weights:
            total = total + weight
        divisor = total.to(dtype).item()
        return [self.lam, 1.0 if abs(divisor) < SMALLEST_DIVISOR else divisor, *weights.tolist()]

    def run(self, scope: Scope, names: Sequence[str] | None, *, split: bool = False) -> None:
        if not math.isfinite(torch.tensor(self.lam, dtype=scope.compute).item()):
            raise RuntimeError(f"lam must be finite in the compute type, got {self.lam}")
        finite = FiniteCheck(scope, self.nonfinite, names)
        limits = self._limits(scope, finite)
        options = {
            **self.options,
            "SPLIT": split,
            "ALIGNED_ROWS": split and scope.numel % 16 == 0,
            "HAS_BASE": scope.has_base,
            "DROP": self.nonfinite == "drop",
            "CUTS": self.cuts is not None if self.thresholds is not None else self.semantics != "paper",
            "CHECKED": finite.wanted,
            "TOGETHER": self._together(split),
        }
        sign_sum = torch.zeros(1, dtype=torch.int64, device=scope.device)
        launches = []
        for group in scope.groups:
            rescales = self._rescales(scope, group, limits) if self.rescale else None
            draws = torch.zeros(max(1, group.num_chunks), dtype=torch.int32, device=scope.device)
            arguments_ = (scope.num_tasks, limits, group.numbers, rescales, finite.found, sign_sum, draws)
            launches.append((group, arguments_))
        for again in (False, True) if self.semantics == "paper" else (False,):
            for group, arguments_ in launches:
                _merge[(group.num_chunks,)](
                    *group.place, *arguments_, **options, **group.dtypes, AGAIN=again, ALIGNED=group.aligned,
                    CHUNK=CHUNK, BLOCK=BLOCK_BYTES // group.dtype.itemsize, num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip
        finite.look()

    def _together(self, split: bool) -> int:
        """Experts whose loads are on their way at the same time: as many as fit into the registers beside the sums."""
        if split or self.rule == "paper_max":
            return 1
        return 2 if self.rescale else 4

    def _limits(self, scope: Scope, finite: FiniteCheck) -> Tensor:
        if self.thresholds is None:
            return trim(scope, self.density, self.semantics, self.nonfinite, finite)
        limits = given_limits(self.thresholds, self.cuts, scope)
        finite.count()
        return limits

    def _rescales(self, scope: Scope, group: Group, limits: Tensor) -> Tensor:
        norms = torch.empty(2 * scope.num_tasks * group.num_chunks, dtype=torch.float64, device=scope.device)
        rescales = torch.empty(len(group.table), scope.num_tasks, dtype=scope.compute, device=scope.device)
        _norms[(group.num_chunks,)](
            *group.place, scope.num_tasks, limits, norms, group.num_chunks, **group.dtypes, HAS_BASE=scope.has_base,
            DROP=self.nonfinite == "drop", ALIGNED=group.aligned, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        _rescale[(len(group.table), scope.num_tasks)](
            group.table, group.table.shape[1], scope.num_tasks, norms, group.num_chunks, rescales, **group.dtypes,
            CHUNK=CHUNK, BLOCK=SUMS_AT_ONCE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return rescales


def given_limits(thresholds: Tensor, cuts: Sequence[int] | None, scope: Scope) -> Tensor:
    """As `trim` gives them. Without cuts every tie is kept; with them NaN is a rank like any other."""
    if thresholds.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"thresholds must be float32 or float64, got {thresholds.dtype}")
    if thresholds.numel() != scope.num_tasks:
        raise RuntimeError(f"thresholds must be one value per expert, got {thresholds.numel()}")
    if not is_capturing(scope.device):
        for value in thresholds.tolist():
            if not value >= 0 and not (cuts is not None and math.isnan(value)):
                raise RuntimeError(f"thresholds must be 0 or greater, got {value:g}")
    values = thresholds.reshape(-1).to(scope.compute)
    values = upload(values, scope.device) if values.device.type == "cpu" else values
    keys = values.view(torch.int64 if scope.wide else torch.int32).to(torch.int64) & LARGEST[scope.compute]
    limits = torch.zeros(scope.num_tasks, FIELDS.value, dtype=torch.int64, device=scope.device)
    limits[:, THRESHOLD.value] = keys
    if cuts is not None:
        limits[:, CUT.value] = upload(torch.tensor(cuts, dtype=torch.int64), scope.device)
    return limits


def ties_merge(
    base: Tensor | None,
    experts: Sequence[Tensor],
    density: Sequence[float],
    lam: float = 1.0,
    weights: Sequence[float] | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    reduce: str = "mean",
    normalize: bool = True,
    rescale: bool = False,
    nonfinite: str = "error",
    thresholds: Tensor | None = None,
) -> Tensor:
    check_one_tensor(experts, density)
    out = torch.empty_like(experts[0], memory_format=torch.contiguous_format)
    ties_merge_out(
        [] if base is None else [base], experts, density, lam, weights, semantics, elect, reduce, normalize, rescale,
        nonfinite, thresholds, out=[out],
    )  # fmt: skip
    return out


def ties_merge_out(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    density: Sequence[float],
    lam: float = 1.0,
    weights: Sequence[float] | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    reduce: str = "mean",
    normalize: bool = True,
    rescale: bool = False,
    nonfinite: str = "error",
    thresholds: Tensor | None = None,
    cuts: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    *,
    out: Sequence[Tensor],
) -> None:
    merger = Merger(
        len(density), density=density, lam=lam, weights=weights, semantics=semantics, elect=elect, reduce=reduce,
        normalize=normalize, rescale=rescale, nonfinite=nonfinite, thresholds=thresholds, cuts=cuts,
    )  # fmt: skip
    scope = Scope(base, experts, len(density), out, numbers=merger.numbers)
    merger.run(scope, names)
    scope.deliver()


def ties_split(
    base: Tensor | None,
    experts: Sequence[Tensor],
    density: Sequence[float],
    weights: Sequence[float] | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    rescale: bool = False,
    nonfinite: str = "error",
    thresholds: Tensor | None = None,
) -> Tensor:
    check_one_tensor(experts, density)
    merger = Merger(
        len(density), density=density, weights=weights, semantics=semantics, elect=elect, rescale=rescale,
        nonfinite=nonfinite, thresholds=thresholds,
    )  # fmt: skip
    out = experts[0].new_empty((len(experts), *experts[0].shape))
    bases = [] if base is None else [base]
    merger.run(Scope(bases, experts, len(density), stacked=out, numbers=merger.numbers), None, split=True)
    return out
