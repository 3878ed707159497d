"""Methods that decide for every entry by how far it moved and how much the models agree: NearSwap, SCE, RAM, Arcee.

RAM is a merge of TIES' op; the others are a few steps of torch over blocks that stay in the cache, in mergekit's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.ties_merge import check_options
from ..blocks import Block, blocks, ranked
from ..method import AT_LEAST_0, FINITE, SHARE, Method, arithmetic_of, nonfinite_policy, shared
from ..scope import Scope

SMALLEST = 1e-6  # distance, weight or sum of weights that is divided by
OFFSET = 1e-8  # what arcee_fusion adds to probabilities


@dataclass(frozen=True)
class NearSwap(Method):
    """Moves every entry of the base towards the other model's, by `t` at most: near ones are swapped."""

    name = "nearswap"
    title = "NearSwap"
    formula = "w * expert + (1 - w) * base, w = clamp(t / max(|base - expert|, 1e-6), 0, 1)"
    source = "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001; mergekit 0.1.5 `nearswap`"
    num_experts = (1, 1)

    t: float = shared(range=FINITE, meaning="largest change of an entry")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        for part in scope.parts():
            for block in blocks(part, _dtype(part, self.arithmetic), nonfinite=self.nonfinite):
                base, expert = block.base, block.experts[0]
                weight = (self.t / (base - expert).abs().clamp(min=SMALLEST)).clamp(0, 1)
                block.write(weight * expert + (1 - weight) * base)


@dataclass(frozen=True)
class Sce(Method):
    """Selects the entries that vary most, weighs experts by how much they changed, and erases minorities."""

    name = "sce"
    title = "SCE"
    formula = "base + sum of w_t m_t tau_t / max(sum of w_t m_t, 1e-6), w_t ~ mean(tau_t^2), m_t: the elected sign"
    source = "FuseChat-3.0, SCE (arXiv 2408.07990); mergekit 0.1.5 `sce`"
    decides = "tensor"
    ignored = ("int8_mask",)

    select_topk: float = shared(1.0, range=SHARE, meaning="share of the entries with nonzero variance that are merged")
    arithmetic: str = arithmetic_of()
    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 2 if self.select_topk >= 1 else 6

    def merge(self, scope: Scope) -> None:
        for part in scope.parts():
            self._merge_tensor(part)

    def _merge_tensor(self, scope: Scope) -> None:
        threshold, ties = self._selected(scope) if self.select_topk < 1 else (None, 0)
        dtype = _dtype(scope, self.arithmetic)
        squares = torch.zeros(scope.num_tasks, dtype=torch.float64, device=scope.out[0].device)
        for _, task_vectors in self._masked(scope, dtype, threshold, ties):
            squares += task_vectors.square().double().sum(dim=1)
        means = (squares / max(scope.out[0].numel(), 1)).to(dtype)
        total = means.sum().item()
        weights = means / total if abs(total) >= SMALLEST else torch.ones_like(means) / scope.num_tasks
        for block, task_vectors in self._masked(scope, dtype, threshold, ties):
            elected = (task_vectors.sum(dim=0) >= 0).to(dtype) * 2 - 1
            agreeing = weights[:, None] * (task_vectors.sign() == elected)
            merged = (task_vectors * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=SMALLEST)
            block.write(block.base + merged)

    def _selected(self, scope: Scope) -> tuple[Tensor | None, int]:
        """The smallest variance that is selected, and how many equal to it; None where nothing is."""
        varying = sum(int((key > 0).sum()) for key in self._variances(scope))
        count = int(varying * self.select_topk)
        if count == 0:
            return torch.full((), torch.inf, device=scope.out[0].device), 0
        (threshold,) = ranked(lambda: self._variances(scope), [scope.out[0].numel() - count])
        return threshold, count - sum(int((key > threshold).sum()) for key in self._variances(scope))

    def _variances(self, scope: Scope) -> Iterator[Tensor]:
        """Over the experts, as far as the arithmetic keeps them apart."""
        dtype = _dtype(scope, self.arithmetic)
        for block in blocks(scope, dtype, nonfinite=self.nonfinite):
            yield block.task_vectors.var(dim=0, unbiased=False).to(scope.compute)

    def _masked(
        self, scope: Scope, dtype: torch.dtype, threshold: Tensor | None, ties: int
    ) -> Iterator[tuple[Block, Tensor]]:
        """Every block with its task vectors, 0 where not selected; of equal variances the first in flat order stay."""
        for block in blocks(scope, dtype, nonfinite=self.nonfinite):
            task_vectors = block.task_vectors
            if threshold is not None:
                key = task_vectors.var(dim=0, unbiased=False).to(scope.compute)
                equal = key == threshold
                first = equal & (equal.cumsum(0) <= ties)
                ties -= int(first.sum())
                task_vectors = task_vectors * ((key > threshold) | first)
            yield block, task_vectors


@dataclass(frozen=True)
class Ram(Method):
    """Keeps what one expert alone changed as it is, and averages what several changed."""

    name = "ram"
    title = "Reinforced Agent Merging"
    formula = "base + (the only tau_t that moved, or the mean of those that did), moved: |tau_t| > epsilon"
    source = "Reinforced Agent Merging (arXiv 2601.13572); mergekit 0.1.5 `ram`"

    epsilon: float = shared(1e-5, range=AT_LEAST_0, meaning="an entry that moved no further did not move")
    nonfinite: str = nonfinite_policy()

    def merge(self, scope: Scope) -> None:
        self._merge(scope, None)

    def _merge(self, scope: Scope, unique_scales: Tensor | None) -> None:
        options = check_options(
            scope.num_tasks,
            density=1.0,
            semantics="exact",
            elect="none",
            reduce="unique",
            nonfinite=self.nonfinite,
        )
        above = torch.nextafter(torch.tensor(self.epsilon, dtype=torch.float32), torch.tensor(torch.inf))
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base,
            scope.flat_experts,
            **options,
            thresholds=above.expand(scope.num_tasks),
            unique_scales=unique_scales,
            names=scope.names,
            out=scope.out,
        )


@dataclass(frozen=True)
class RamPlus(Ram):
    """RAM whose lone changes grow the more an expert shares with others, tensor by tensor."""

    name = "ramplus_tl"
    title = "Reinforced Agent Merging Plus"
    formula = "RAM with a lone tau_t times 1 + r * clamp(shared_t / max(unique_t, epsilon), 0, alpha)"
    source = "Reinforced Agent Merging (arXiv 2601.13572); mergekit 0.1.5 `ramplus_tl`"
    decides = "tensor"

    r: float = shared(0.1, meaning="how much a lone change grows")
    alpha: float = shared(0.2, range=AT_LEAST_0, meaning="largest ratio of shared to lone entries that counts")

    @property
    def reads(self) -> int:
        return 3

    def merge(self, scope: Scope) -> None:
        scales = torch.stack([self._scales(part) for part in scope.parts()])
        self._merge(scope, scales)

    def _scales(self, scope: Scope) -> Tensor:
        """float64 [num_tasks], of the lone entries of one tensor."""
        counts = torch.zeros(2, scope.num_tasks, dtype=torch.int64, device=scope.out[0].device)
        for block in blocks(scope, scope.compute, nonfinite=self.nonfinite):
            moved = block.task_vectors.abs() > self.epsilon
            several = moved.sum(dim=0) > 1
            counts += torch.stack([(moved & several).sum(dim=1), (moved & ~several).sum(dim=1)])
        together, alone = counts.double().cpu()
        return 1 + self.r * (together / alone.clamp(min=self.epsilon)).clamp(0, self.alpha)


@dataclass(frozen=True)
class ArceeFusion(Method):
    """Takes over the changes that matter most: far from the base, in rows whose softmax the model has changed.

    Importance is computed in float64 and the quartiles are exact. mergekit's, in bfloat16, is rounding noise, and above
    a million entries it takes the quartiles of a random sample.
    """

    name = "arcee_fusion"
    title = "Arcee Fusion"
    formula = "base + tau where |tau| * KL(softmax(expert) || softmax(base)) >= median + 1.5 * (third - first quartile)"
    source = "arcee.ai; mergekit 0.1.5 `arcee_fusion`"
    num_experts = (1, 1)
    decides = "tensor"

    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 5

    def merge(self, scope: Scope) -> None:
        for part in scope.parts():
            if part.out[0].numel():
                self._merge_tensor(part)

    def _merge_tensor(self, scope: Scope) -> None:
        divergences = [_divergence(block) for block in self._rows(scope, torch.float64)]  # [rows] in all

        def importance() -> Iterator[Tensor]:
            for block, divergence in zip(self._rows(scope, scope.compute), divergences, strict=True):
                yield block.task_vectors[0].abs() * divergence.to(scope.compute)[:, None]

        last = scope.out[0].numel() - 1
        first, median, third = ranked(importance, [int(share * last) for share in (0.25, 0.5, 0.75)])
        threshold = median + 1.5 * (third - first)
        for block, key in zip(self._rows(scope, scope.compute), importance(), strict=True):
            block.write(block.base + torch.where(key >= threshold, block.task_vectors[0], 0.0))

    def _rows(self, scope: Scope, dtype: torch.dtype) -> Iterator[Block]:
        return blocks(scope, dtype, nonfinite=self.nonfinite, by_row=True)


def _divergence(block: Block) -> Tensor:
    """Of the softmax of every row from that of the base; rounding leaves none below 0.  # [rows]"""
    p, q = (x.softmax(dim=-1) + OFFSET for x in (block.experts[0], block.base))
    return (p * (p / q).log()).sum(dim=-1).clamp(min=0)


def _dtype(scope: Scope, arithmetic: str) -> torch.dtype:
    """What the steps are rounded to."""
    return scope.out[0].dtype if arithmetic == "mergekit" else scope.compute
