"""Singular values of a merged model set right afterwards: SVC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...method import ABOVE_0, shared
from ...scope import Scope
from .family import Leading, TaskVectors
from .within import INNER, Within

SMALLEST = 1e-12  # square norm that is divided by


@dataclass(frozen=True)
class Svc(Within):
    """Scales the singular values of another method's task vectors, by how often experts share their directions.

    Where the merged task vector has more of an expert's than that has itself, it is scaled down. Only matrices are.

    Args:
        merged: A model that was merged already, for which `inner` then does not count.
    """

    name = "svc"
    title = "SVC"
    formula = "base + U diag(g s) V^T, U s V^T = merged - base, g_r = n / sum_t max(least, <a_r, x_rt> / |x_rt|^2)"
    source = "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging (arXiv 2602.05536)"

    inner: str = shared("task_arithmetic", choices=tuple(INNER), meaning="the method that merges")
    least: float = shared(1.0, range=ABOVE_0, meaning="what a direction counts for at least, for every expert")
    merged: Mapping[str, Tensor] | None = shared(None, kind=object, key=None, meaning="a model merged already")

    def merge(self, scope: Scope) -> None:
        wide = _widened(scope)
        if self.merged is None:
            self._merged_by(self._inner(), wide)
        else:
            known = scope.check_by_name("merged", [self.merged])
            if missing := [name for name in wide.names if name not in known]:
                raise ValueError(f"merged must have the names of base, got no {missing[0]!r}")
            wide.copy([self.merged[known[name]] for name in wide.names])
        for part in wide.parts():
            if part.out[0].dim() == 2 and part.out[0].numel() and bool(part.out[0].isfinite().all()):
                self._calibrate(part)
        scope.copy(wide.out)

    def _calibrate(self, part: Scope) -> None:
        vectors = TaskVectors(part, self.nonfinite == "drop")
        change = Leading.of(vectors.matrix(part.out[0]) - vectors.origin, vectors.rank)
        if not len(change.values):
            return
        response = change.values[:, None] * change.right
        shares = torch.zeros_like(change.values)
        for vector in vectors:
            own = change.left.mT @ vector
            share = (response * own).sum(-1) / own.square().sum(-1).clamp(min=SMALLEST)
            shares += share.clamp(min=self.least)
        scaled = replace(change, values=change.values * (len(vectors) / shares))
        part.out[0].copy_(vectors.origin + scaled.product)


def _widened(scope: Scope) -> Scope:
    """In what is computed in, with an output of its own."""
    dtype = scope.compute
    return replace(
        scope,
        base=[tensor.to(dtype) for tensor in scope.base],
        experts=[[expert.to(dtype) for expert in experts] for experts in scope.experts],
        out=[torch.empty_like(tensor, dtype=dtype) for tensor in scope.out],
    )
