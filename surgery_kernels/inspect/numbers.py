"""What is counted and summed over a tensor of all models, and what follows from it for any set of tensors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops.census import Census, census
from ..ops.gram import gram
from ..ops.trim import keep_count

SHARES = {  # the columns of tables, and what they mean
    "conflict": "of the entries that any expert changes, those that one raises and another lowers",
    "lost": "share of the magnitude of all changes that goes against the direction which has more of it",
    "kept": "share of all entries that TIES keeps of any expert at the density, tensor by tensor",
    "shared": "of these, those that it keeps of more than one",
    "clashing": "of these, those kept in both directions, of which the election drops some",
}
Sum = TypeVar("Sum")  # what can be added up

QUANTILES = (0.5, 0.99, 1.0)  # of the magnitudes of an expert's changes in a tensor


@dataclass(frozen=True)
class Numbers:
    """Of one tensor, or the sum over several: what adds up."""

    numel: int
    products: Tensor  # float64 [num_tasks, num_tasks], <expert_i - base, expert_j - base>
    census: Census

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(self.numel + other.numel, self.products + other.products, self.census + other.census)

    @property
    def num_tasks(self) -> int:
        return len(self.products)

    @cached_property
    def norms(self) -> list[float]:
        """Length of every task vector."""
        return self.products.diagonal().clamp_min(0).sqrt().tolist()

    @property
    def relative(self) -> list[float]:
        """Of the base's length; infinity where that is 0 and the expert's change is not."""
        length = math.sqrt(self.census.base_square.item())
        return [norm / length if length else math.inf if norm else 0.0 for norm in self.norms]

    @property
    def cosines(self) -> list[list[float]]:
        """Of every pair of task vectors; NaN where one of them is 0."""
        norms = torch.tensor(self.norms, dtype=torch.float64)
        return (self.products / (norms[:, None] * norms)).clamp(-1, 1).tolist()

    @property
    def changed(self) -> list[float]:
        """Share of its entries that each expert changes."""
        return [share(count, self.numel) for count in self.census.changed.tolist()]

    @property
    def conflict(self) -> float:
        """Share of the entries that any expert changes which one raises and another lowers."""
        return share(self.census.conflicts.item(), self.census.touched.item())

    @property
    def lost(self) -> float:
        """Share of the magnitude of all changes which goes against the direction that has more of it."""
        return share(self.census.lesser.item(), self.census.mass.sum().item())

    @property
    def kept_by_any(self) -> float:
        """Share of all entries that TIES at the density keeps of one expert at least."""
        return share(self.census.kept_by_any.item(), self.numel)

    @property
    def kept_by_two(self) -> float:
        """Share of these that it keeps of more than one."""
        return share(self.census.kept_by_two.item(), self.census.kept_by_any.item())

    @property
    def kept_conflict(self) -> float:
        """Share of these in which kept changes go in both directions, so that the election drops some."""
        return share(self.census.kept_conflicts.item(), self.census.kept_by_any.item())

    @property
    def shares(self) -> dict[str, float]:
        """Those that tables have of every place, under SHARES."""
        values = (self.conflict, self.lost, self.kept_by_any, self.kept_by_two, self.kept_conflict)
        return dict(zip(SHARES, values, strict=True))

    @property
    def against(self) -> list[list[float]]:
        """Of every pair, the share of entries changed by both in which they go in two directions."""
        pairs = zip(self.census.against.tolist(), self.census.both.tolist(), strict=True)
        return [[share(*counts) for counts in zip(*rows, strict=True)] for rows in pairs]

    def as_json(self) -> dict[str, Any]:
        return {
            "parameters": self.numel,
            "norms": self.norms,
            "relative": self.relative,
            "cosines": self.cosines,
            "changed": self.changed,
            "conflict": self.conflict,
            "lost": self.lost,
            "kept_by_any": self.kept_by_any,
            "kept_by_two": self.kept_by_two,
            "kept_conflict": self.kept_conflict,
            "against": self.against,
            "nonfinite": self.census.nonfinite.tolist(),
            "zeros": self.census.zeros.tolist(),
            "saturated": self.census.saturated.tolist(),
        }


@dataclass(frozen=True)
class Spectrum:
    """Of a matrix of a task vector, by a randomised decomposition (arXiv 0909.4061)."""

    stable_rank: float  # square of the length over that of the largest singular value: 1 to the rank
    leading: float  # share of the square of the length in the LEADING largest


LEADING = 8


def measure(
    base: Tensor, experts: Sequence[Tensor], density: float, products: Tensor | None = None
) -> tuple[Numbers, list[list[float]]]:
    """The numbers of one tensor, and its QUANTILES [num_tasks][quantile]. Three passes over it, one read from disk.

    products: Of the task vectors, where they are known: a pass less.
    """
    numel, n = base.numel(), len(experts)
    if numel == 0:
        zero = torch.zeros(n, n, dtype=torch.float64)
        return Numbers(0, zero, census(base, experts)), [[0.0] * len(QUANTILES) for _ in experts]
    ranks = [max(1, keep_count(numel, density, "paper")), *(numel - math.ceil(q * numel) + 1 for q in QUANTILES)]
    thresholds, _ = torch.ops.surgery_kernels.trim_limits(
        [base], list(experts), [1.0] * n, "paper", "drop", None, ranks * n
    )
    limits = thresholds.double().view(n, len(ranks))
    counted = census(base, experts, thresholds=limits[:, 0].tolist())
    products = gram(base, experts, nonfinite="drop") if products is None else products
    return Numbers(numel, products, counted), limits[:, 1:].tolist()


def spectrum(base: Tensor, expert: Tensor) -> Spectrum:
    """Of ``expert - base`` as a matrix [shape[0], the rest]; the same whenever it is asked for."""
    change = (expert.float() - base.float()).flatten(1).nan_to_num(0, 0, 0)
    square = change.double().square().sum().item()
    if square == 0:
        return Spectrum(0.0, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, values, _ = torch.svd_lowrank(change, q=min(2 * LEADING, *change.shape), niter=2)
    squares = values.double().square()
    return Spectrum(square / squares[0].item(), min(1.0, squares[:LEADING].sum().item() / square))


def total(numbers: Iterable[Sum]) -> Sum:
    """Of one or more."""
    return functools.reduce(operator.add, numbers)


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
