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
from .addresses import CHUNK, OFFSET, Scope, is_capturing, locate, upload
from .finite import FiniteCheck
from .ties_block import merge_block
from .ties_rescale import rescales_of
from .trim import check_one_tensor, trim
from .trim_rounds import CUT, FIELDS, LARGEST, THRESHOLD

BLOCK_BYTES = 2048  # of a tensor, read together: 16 for each of 128 threads
SMALLEST_DIVISOR = 1e-8  # below it mergekit does not divide


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
        signs_of_block, draws_of_block = merge_block(
            row, begin + at, BLOCK, flat + at, num_tasks, limits, numbers, rescales, draw_sign,
            RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, HAS_BASE, DROP, CUTS, True, ALIGNED, BLOCK, TOGETHER,
        )  # fmt: skip
        signs += signs_of_block
        draws_here += draws_of_block
    if whole < count:
        signs_of_block, draws_of_block = merge_block(
            row, begin + whole, count - whole, flat + whole, num_tasks, limits, numbers, rescales, draw_sign,
            RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, SPLIT, ALIGNED_ROWS,
            STORED, COMPUTE, HAS_BASE, DROP, CUTS, False, ALIGNED, BLOCK, TOGETHER,
        )  # fmt: skip
        signs += signs_of_block
        draws_here += draws_of_block
    if (RULE == "paper" or RULE == "paper_max") and not AGAIN:
        tl.atomic_add(sign_sum, signs.to(tl.int64), sem="relaxed")
        tl.store(draws + tl.program_id(0), draws_here)


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
            rescales = rescales_of(scope, group, limits, self.nonfinite) if self.rescale else None
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
