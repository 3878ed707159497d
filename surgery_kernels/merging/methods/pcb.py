"""PCB-Merging: every change weighs as much as its expert holds on to it and the other experts agree with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.masks import unpack
from ..method import (
    SHARE_ABOVE_0,
    Method,
    Range,
    nonfinite_policy,
    per_model,
    shared,
    task_vector_scale,
)
from ..scope import Scope
from . import score_programs

INTER = ("paper", "half", "raw")
SAMPLE = 1 << 14  # entries whose scores are looked at first, at least
SIGMAS = 5.0  # of a sampled rank: how far from it the one that is sought may lie


@dataclass(frozen=True)
class Pcb(Method):
    """Averages the changes that matter most to their expert and agree with the others': parameter competition balanced.

    The rule of the authors' `pcb_ES.py`, which is closest to the paper and the only one of theirs that does not depend
    on the scale of the task vectors. An expert that changed nothing, or everything by the same amount, has no weight.
    """

    name = "pcb"
    title = "PCB-Merging"
    formula = "base + lam * sum of w_t weights_t tau_t / sum of w_t, w_t: how far its score is above a limit"
    source = "PCB-Merging (arXiv 2410.02396)"
    decides = "scope"
    decides_by = ("density",)
    scope = "model"
    recipe_scope = "model"

    density: PerExpert = per_model(0.05, range=SHARE_ABOVE_0, meaning="share of its entries that have a weight")
    lam: float = task_vector_scale()
    weights: PerExpert | None = per_model(None, key="weight", meaning="factor of each task vector")
    clip: float = shared(0.01, range=Range(0, 0.5, open_high=True), meaning="share of entries clipped at either end")
    inter: str = shared(
        "paper",
        choices=INTER,
        meaning="agreement is tanh of products of normed changes; or as the authors' `pcb.py`, or `pcb-merging.py`",
    )
    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 3

    def decide(self, scope: Scope) -> dict[str, Any]:
        """The limits of every expert's changes, and those of its scores, over the scope."""
        numel = sum(experts[0].numel() for experts in scope.experts)
        if numel == 0:
            return {"numbers": [0.0] * (6 * scope.num_tasks)}
        clipping = self._clipping(scope, numel)
        ranks = [numel - int(numel * (1 - d)) for d in arguments.per_expert("density", self.density, scope.num_tasks)]
        search = ScoreSearch(scope, clipping, self.inter, self.nonfinite == "drop")
        limits = []
        for (threshold, top), weight in zip(
            search.limits(ranks), arguments.check_weights(self.weights, scope.num_tasks), strict=True
        ):
            height = top - threshold
            limits += [threshold, height if height > 0 else math.inf, self.lam * weight]
        return {"numbers": clipping + limits}

    def _clipping(self, scope: Scope, numel: int) -> list[float]:
        """Of every expert the magnitudes between which its changes are clipped, and how far apart these are."""
        ranks = [-1 - int(numel * self.clip), -1 - max(0, int(numel * (1 - self.clip) - 1))]
        thresholds, _ = torch.ops.surgery_kernels.trim_limits(
            scope.base,
            scope.flat_experts,
            [1.0] * scope.num_tasks,
            semantics="mergekit",
            nonfinite=self.nonfinite,
            names=scope.names,
            ranks=ranks * scope.num_tasks,
        )
        numbers = []
        for low, high in thresholds.double().view(-1, 2).tolist():
            numbers += [low, high, high - low if high > low else math.inf]
        return numbers

    def merge(self, scope: Scope) -> None:
        facts = self.decide(scope) if scope.decided is None else scope.decided
        for part in scope.parts():
            if part.out[0].numel():
                wide = part.out[0].dtype == torch.float64
                steps = score_programs.merged(scope.num_tasks, self.inter, wide, self.nonfinite == "drop")
                steps.run(part.inputs, facts["numbers"], out=part.out)


class ScoreSearch:
    """Exact order statistics of scores, which lie in no tensor, from about one read.

    The scores of a sample bracket each limit. One read then counts the scores above every bracket and marks, in a bit,
    entries with a score inside one; the scores of these alone are formed again and sorted.
    """

    def __init__(self, scope: Scope, clipping: Sequence[float], inter: str, drop: bool) -> None:
        self._parts = [part for part in scope.parts() if part.experts[0][0].numel()]
        self._numel = sum(part.experts[0][0].numel() for part in self._parts)
        self._num_tasks, self._clipping = scope.num_tasks, list(clipping)
        self._wide = scope.experts[0][0].dtype == torch.float64
        self._program = (scope.num_tasks, inter, self._wide, drop)

    def limits(self, ranks: Sequence[int]) -> list[tuple[float, float]]:
        """Of every expert the score of its rank, counted from the highest, and the highest."""
        stride = max(1, self._numel // max(SAMPLE, 2 * int(self._numel ** (2 / 3))))
        while True:
            sample = torch.cat([self._scores(part, self._sampled(part, stride)) for part in self._parts], dim=1)
            if stride == 1:
                return [(_largest(row, rank), _largest(row, 1)) for row, rank in zip(sample, ranks, strict=True)]
            brackets = [self._bracket(row, rank) for row, rank in zip(sample, ranks, strict=True)]
            if found := self._within(brackets, ranks):
                return found
            stride = stride // 8 if stride > 8 else 1  # the sample misled

    def _bracket(self, sample: Tensor, rank: int) -> tuple[float, float, float]:
        """Scores between which that of the rank lies, and one that only few are above."""
        share = rank / self._numel
        middle, spread = share * len(sample), SIGMAS * math.sqrt(len(sample) * share * (1 - share)) + 2
        first, last = math.floor(middle - spread), min(len(sample), math.ceil(middle + spread))
        high = math.inf if first < 1 else _largest(sample, first)
        return _largest(sample, last), high, _largest(sample, min(2, len(sample)))

    def _within(
        self, brackets: Sequence[tuple[float, float, float]], ranks: Sequence[int]
    ) -> list[tuple[float, float]]:
        """Empty where a score that is sought is in no bracket."""
        numbers = self._clipping + [x for bracket in brackets for x in bracket]
        near, marked = score_programs.near(*self._program), []
        above = torch.zeros(self._num_tasks, dtype=torch.float64)
        for part in self._parts:
            first = part.experts[0][0]
            bits = torch.empty(-(-first.numel() // 8), dtype=torch.uint8, device=first.device)
            above += near.run(part.inputs, numbers, out=[bits]).cpu()[0]
            marked.append(self._scores(part, unpack(bits[None], (first.numel(),))[0].nonzero()[:, 0]))
        found = []
        for (low, high, _), rank, before, scores in zip(
            brackets, ranks, above.tolist(), torch.cat(marked, dim=1), strict=True
        ):
            inside, place = scores[(scores >= low) & (scores <= high)], rank - int(before)
            if not 1 <= place <= len(inside):
                return []
            found.append((_largest(inside, place), _largest(scores, 1)))
        return found

    def _sampled(self, part: Scope, stride: int) -> Tensor:
        """Places in a tensor, one in every stretch of `stride`, at places of it that look random."""
        numel, device = part.experts[0][0].numel(), part.experts[0][0].device
        starts = torch.arange(0, numel, stride, device=device)
        places = starts + (starts // stride * 0x9E3779B1 & 0xFFFFFFFF) * stride // (1 << 32)
        return places[places < numel]

    def _scores(self, part: Scope, places: Tensor) -> Tensor:
        """[num_tasks, places] in the compute type"""
        taken = [x.reshape(-1)[places].to(part.compute) for x in part.inputs]
        scores = torch.empty(self._num_tasks, len(places), dtype=part.compute, device=places.device)
        score_programs.scores(*self._program).run(taken, self._clipping, out=list(scores))
        return scores


def _largest(scores: Tensor, rank: int) -> float:
    """The one of a rank, counted from the largest."""
    return scores.kthvalue(len(scores) + 1 - rank).values.item()
