"""TIES on CUDA tensors: trim, elect, disjoint merge, scale, add to base and round, fused.

Each input is read once after the trim, or with it where inputs are large (`ties_one_read.py`). The sums of the positive
and of the negative entries are kept side by side, so that the election needs no second look at the experts. Under
"paper" a drawn election takes the sign of the sum of all elected signs, known at the end: the merge assumes plus, and a
second launch merges the chunks with draws again where that was wrong.
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
from ..ops.ties_merge import SCALED
from .addresses import CHUNK, TYPES, Group, Scope, upload
from .finite import FiniteCheck
from .ties_chunk import merge_chunk
from .ties_keep import DRAWN, Keep, given_keys
from .ties_one_read import Launch, OneRead, reads_once
from .ties_pairs import pairs_for
from .ties_rescale import rescales_of
from .trim import check_one_tensor, trim
from .trim_rounds import CUT, FIELDS, PROGRAMS, THRESHOLD

BLOCK_BYTES = 2048  # of a tensor, read together: 16 for each of 128 threads
SMALLEST_DIVISOR = 1e-8  # below it mergekit does not divide


@triton.jit
def _merge(
    table, num_parts, columns, num_tasks, limits, numbers, rescales, unique_scales, keep, nonfinite, sign_sum, draws,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, HAS_UNIQUE: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr,
    HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr,
    CHECKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The chunk of this program, its draws as if plus were elected."""
    if CHECKED:  # noqa: SIM102  # there is no pointer to load from otherwise
        if tl.load(nonfinite) != 0:
            return
    signs, draws_here, _, _, _ = merge_chunk(
        table, num_parts, columns, tl.program_id(0), num_tasks, limits, numbers, rescales, unique_scales, keep, 1, None,
        RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT, ALIGNED_ROWS,
        STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, CHUNK, BLOCK, TOGETHER, 0, 0,
    )  # fmt: skip
    if RULE == "paper" or RULE == "paper_max":
        tl.atomic_add(sign_sum, signs.to(tl.int64), sem="relaxed")
        tl.store(draws + tl.program_id(0), draws_here)


@triton.jit
def _merge_draws(
    table, num_parts, columns, num_chunks, num_tasks, limits, numbers, rescales, unique_scales, keep, nonfinite,
    sign_sum, draws,
    RULE: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_RESCALES: tl.constexpr, HAS_UNIQUE: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, ROUNDED: tl.constexpr,
    HAS_BASE: tl.constexpr, DROP: tl.constexpr, CUTS: tl.constexpr, PAIRS: tl.constexpr,
    CHECKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The chunks with draws again, by few programs, where `sign_sum` has turned out not to be plus."""
    if CHECKED:  # noqa: SIM102
        if tl.load(nonfinite) != 0:
            return
    sum_of_all = tl.load(sign_sum)
    if sum_of_all > 0:
        return
    draw_sign = tl.where(sum_of_all < 0, -1, 0)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        if tl.load(draws + chunk) != 0:
            merge_chunk(
                table, num_parts, columns, chunk, num_tasks, limits, numbers, rescales, unique_scales, keep, draw_sign,
                None, RULE, ELECT, DIVIDE, HAS_WEIGHTS, HAS_RESCALES, HAS_UNIQUE, KEEP, SPLIT, ALIGNED_ROWS,
                STORED, COMPUTE, ROUNDED, HAS_BASE, DROP, CUTS, PAIRS, CHUNK, BLOCK, TOGETHER, 0, 0,
            )  # fmt: skip


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
        scales: Tensor | None = None,
        unique_scales: Tensor | None = None,
        keep: Keep | None = None,
    ) -> None:
        arguments.check_one_of("semantics", semantics, arguments.SEMANTICS)
        arguments.check_one_of("elect", elect, arguments.ELECT)
        arguments.check_one_of("reduce", reduce, arguments.REDUCE)
        with_semantics = f"with semantics={semantics!r}, got"
        if reduce == "max" and semantics != "paper":
            raise RuntimeError(f"reduce must be 'mean' or 'sum' {with_semantics} 'max'")
        if reduce in ("magmax", "unique") and (semantics != "exact" or elect != "none"):
            raise RuntimeError(
                f"semantics and elect must be 'exact' and 'none' with reduce={reduce!r}, "
                f"got {semantics!r} and {elect!r}"
            )
        if elect == "none" and semantics not in SCALED:
            raise RuntimeError(f"elect must be 'sum' or 'count' {with_semantics} 'none'")
        if semantics not in SCALED and (rescale or not normalize):
            raise RuntimeError(f"normalize and rescale must keep their defaults {with_semantics} others")
        if weights is not None and len(weights) != num_tasks:
            raise RuntimeError(f"weights must be one per expert, got {len(weights)}")
        if weights is not None and semantics == "paper":
            raise RuntimeError("weights must be None with semantics='paper', got weights")
        if weights is not None and reduce in ("magmax", "unique"):
            raise RuntimeError(f"weights must be None with reduce={reduce!r}, got weights")
        if reduce == "unique" and not normalize:
            raise RuntimeError("normalize must be True with reduce='unique', got False")
        if scales is not None and semantics not in SCALED:
            raise RuntimeError("semantics must be 'mergekit' or 'exact' where scales are given, got another")
        if scales is not None and rescale:
            raise RuntimeError("rescale must be False where scales are given, got True")
        if unique_scales is not None and reduce != "unique":
            raise RuntimeError(f"reduce must be 'unique' where unique_scales are given, got {reduce!r}")
        if cuts is not None and thresholds is None:
            raise RuntimeError("thresholds must be given where cuts are, got none")
        if cuts is not None and len(cuts) != num_tasks:
            raise RuntimeError(f"cuts must be one per expert, got {len(cuts)}")
        self.density, self.lam, self.weights, self.semantics = density, lam, weights, semantics
        self.nonfinite, self.thresholds, self.cuts, self.rescale = nonfinite, thresholds, cuts, rescale
        self.scales, self.unique_scales, self.keep = scales, unique_scales, keep or Keep(num_tasks)
        self.rule = semantics
        if reduce in ("max", "magmax"):
            self.rule = "paper_max" if reduce == "max" else "magmax"
        elif elect == "none":
            self.rule = f"{semantics}_all"
        self.options: dict[str, Any] = {
            "RULE": self.rule,
            "ELECT": elect,
            "DIVIDE": reduce in ("mean", "unique") and normalize,
            "HAS_WEIGHTS": weights is not None,
            "HAS_RESCALES": rescale or scales is not None,
            "HAS_UNIQUE": unique_scales is not None,
            "KEEP": self.keep.flags,
        }

    def numbers(self, dtype: torch.dtype) -> list[float]:
        """lam, the divisor without an election, and the weights, as exactly as they are used."""
        compute = torch.promote_types(dtype, torch.float32)
        stored = {"mergekit": dtype, "exact": compute}.get(self.semantics, torch.float32)
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
        if not self._reads_once(scope, split):
            limits = self._limits(scope, finite)
            launches = self._launches(scope, finite, split, limits)
            self._merge(scope, limits, launches)
        else:
            launches = self._launches(scope, finite, split)
            one_read = OneRead(scope, launches)
            limits = trim(scope, self.density, self.semantics, self.nonfinite, finite, one_read.read)
            if one_read.merged:
                one_read.correct(limits)
            else:  # there is no threshold to be found
                self._merge(scope, limits, launches)
        for group, arguments_, constants in launches if self.semantics == "paper" else ():
            programs = min(group.num_chunks, PROGRAMS)
            _merge_draws[(programs,)](
                *group.place, group.num_chunks, scope.num_tasks, limits, *arguments_, **constants
            )  # fmt: skip
        finite.look()

    def _reads_once(self, scope: Scope, split: bool) -> bool:
        narrows = self.rescale or self.keep.by_mask or self.keep.upper is not None
        return not split and self.thresholds is None and not narrows and reads_once(scope)

    @staticmethod
    def _merge(scope: Scope, limits: Tensor, launches: Sequence[Launch]) -> None:
        for group, arguments_, constants in launches:
            _merge[(group.num_chunks,)](*group.place, scope.num_tasks, limits, *arguments_, **constants)

    def _launches(
        self, scope: Scope, finite: FiniteCheck, split: bool, limits: Tensor | None = None
    ) -> Sequence[Launch]:
        """limits: for `rescale`."""
        options = {
            **self.options,
            "SPLIT": split,
            "ALIGNED_ROWS": split and scope.numel % 16 == 0,
            "HAS_BASE": scope.has_base,
            "DROP": self.nonfinite == "drop",
            "CUTS": self.cuts is not None if self.thresholds is not None else self.semantics != "paper",
            "CHECKED": finite.wanted,
            "PAIRS": pairs_for(scope.num_tasks),
            "TOGETHER": self._together(split),
        }
        sign_sum = torch.zeros(1, dtype=torch.int64, device=scope.device)
        launches = []
        for group, keep in zip(scope.groups, self.keep.tables(scope), strict=True):
            rescales = self._rescales(scope, group, limits, keep)
            unique_scales = _factors("unique_scales", self.unique_scales, scope, group)
            draws = torch.zeros(max(1, group.num_chunks), dtype=torch.int32, device=scope.device)
            arguments_ = (group.numbers, rescales, unique_scales, keep, finite.found, sign_sum, draws)
            rounded = group.dtypes["COMPUTE" if self.semantics == "exact" else "STORED"]
            constants = {
                **options, **group.dtypes, "ROUNDED": rounded, "CHUNK": CHUNK,
                "BLOCK": BLOCK_BYTES // group.dtype.itemsize, "num_warps": 4, "enable_fp_fusion": False,
            }  # fmt: skip
            launches.append(Launch(group, arguments_, constants))
        return launches

    def _together(self, split: bool) -> int:
        """Experts whose loads are on their way at the same time: as many as fit into the registers beside the sums."""
        if split or self.rule == "paper_max" or self.options["KEEP"] & DRAWN.value:
            return 1
        return 2 if self.options["HAS_RESCALES"] or self.options["KEEP"] or self.rule == "magmax" else 4

    def _rescales(self, scope: Scope, group: Group, limits: Tensor | None, keep: Tensor | None) -> Tensor | None:
        if not self.rescale or limits is None:
            return _factors("scales", self.scales, scope, group)
        dtype = group.dtype
        # mergekit rounds norms and ratio to the dtype, but its random methods take float32 for float16
        if self.semantics == "exact" or (self.keep.by_mask and dtype == torch.float16):
            dtype = scope.compute
        return rescales_of(scope, group, limits, self.nonfinite, keep, self.keep.flags, TYPES[dtype])

    def _limits(self, scope: Scope, finite: FiniteCheck) -> Tensor:
        if self.thresholds is None:
            return trim(scope, self.density, self.semantics, self.nonfinite, finite)
        limits = given_limits(self.thresholds, self.cuts, scope)
        finite.count()
        return limits


def given_limits(thresholds: Tensor, cuts: Sequence[int] | None, scope: Scope) -> Tensor:
    """As `trim` gives them. Without cuts every tie is kept; with them NaN is a rank like any other."""
    keys = given_keys(thresholds, scope, "thresholds", cuts is not None)
    limits = torch.zeros(scope.num_tasks, FIELDS.value, dtype=torch.int64, device=scope.device)
    limits[:, THRESHOLD.value] = keys
    limits[:, CUT.value] = scope.numel if cuts is None else upload(torch.tensor(cuts, dtype=torch.int64), scope.device)
    return limits


def _factors(argument: str, given: Tensor | None, scope: Scope, group: Group) -> Tensor | None:
    """Of every tensor of the group and every expert, in the compute type."""
    if given is None:
        return None
    shape = (len(scope.experts) // scope.num_tasks, scope.num_tasks)
    if given.dtype != torch.float64 or given.shape != shape:
        raise RuntimeError(f"{argument} must be float64 {list(shape)}, got {given.dtype} {list(given.shape)}")
    return upload(given.cpu()[scope.parts_of(group)].to(scope.compute), scope.device)


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
    keep: Sequence[Tensor] | None = None,
    upper: Tensor | None = None,
    upper_cuts: Sequence[int] | None = None,
    scales: Tensor | None = None,
    keep_density: Sequence[float] | None = None,
    seed: int = 0,
    tensor_ids: Sequence[int] | None = None,
    task_ids: Sequence[int] | None = None,
    min_count: int = 0,
    unique_scales: Tensor | None = None,
    out: Sequence[Tensor],
) -> None:
    merger = Merger(
        len(density), density=density, lam=lam, weights=weights, semantics=semantics, elect=elect, reduce=reduce,
        normalize=normalize, rescale=rescale, nonfinite=nonfinite, thresholds=thresholds, cuts=cuts, scales=scales,
        unique_scales=unique_scales,
        keep=Keep(len(density), keep, upper, upper_cuts, keep_density, seed, tensor_ids, task_ids, min_count),
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
