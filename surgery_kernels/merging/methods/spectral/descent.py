"""Methods that find a matrix by steps of Adam over task vectors alone, without data: WUDI, DOGE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....ops import arguments
from ....ops.arguments import PerExpert
from ...method import ABOVE_0, SHARE_ABOVE_0, Range, per_model, shared
from ...scope import Scope
from .family import Leading, Spectral, TaskVectors


@dataclass(frozen=True)
class Wudi(Spectral):
    """Moves the sum of the task vectors towards what interferes least with each of them, by steps of Adam.

    The steps are few on purpose: their limit is another point. Together they move no entry further than about
    ``steps * lr``: choose `lr` so that this is as much as task vectors have. The default is the authors', for models
    that were fine-tuned with rates of 1e-5; with too small a one the result is near the plain sum. An expert that
    changed nothing takes no part.
    """

    name = "wudi"
    title = "WUDI"
    formula = "base + lam * argmin_M sum_t |(M - tau_t) tau_t^T|^2 / |tau_t|^2, from M = sum_t tau_t"
    source = "Whoever Started the Interference Should End It (arXiv 2503.08099)"

    steps: int = shared(300, kind=int, range=ABOVE_0, meaning="steps of Adam")
    lr: float = shared(1e-5, range=ABOVE_0, meaning="learning rate")

    def _merged(self, vectors: TaskVectors) -> Tensor:
        total = vectors.sum()
        if len(vectors) == 1:  # Adam would step about it
            return total
        columns = total.shape[1]
        curvature, pull = total.new_zeros(columns, columns), torch.zeros_like(total)
        for vector in vectors:
            square = vector.square().sum()
            if square > 0:
                gram = vector.mT @ vector / square
                curvature += gram
                pull += vector @ gram
        optimizer = torch.optim.Adam([total], lr=self.lr)
        for _ in range(self.steps):
            total.grad = torch.addmm(pull, total, curvature, beta=-2, alpha=2)
            optimizer.step()
        return total.detach()


@dataclass(frozen=True)
class Doge(Spectral):
    """Adds task vectors that one change, found by steps of Adam, has moved apart; of each the largest entries.

    The change keeps out of directions that the experts share. Only matrices are merged: exclude embeddings. What is
    none stays as in the base. An expert that changed nothing takes no part. As in the authors' code an entry is kept
    for the size of the task vector; with `trim` "after" for that of the sum, as in the paper.
    """

    name = "doge"
    title = "DOGE"
    formula = "base + sum_t lam / |tau_t| * m_t * (tau_t + delta), m_t: the largest |tau_t| of the model"
    source = "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent (arXiv 2501.01230)"
    decides = "scope"
    decides_by = ("density",)
    scope = "model"
    recipe_scope = "model"

    lam: float = shared(0.07, key="lambda", meaning="norm that every task vector of a matrix is given")
    density: PerExpert = per_model(0.3, range=SHARE_ABOVE_0, meaning="share of its entries an expert keeps")
    trim: str = shared("before", choices=("before", "after"), meaning="by task vectors, or with the change added")
    subspace: int = shared(6, kind=int, range=Range(1), meaning="the change keeps out of a share of the rank: 1 / it")
    steps: int = shared(400, kind=int, range=ABOVE_0, meaning="steps of Adam")
    lr: float = shared(1e-4, range=ABOVE_0, meaning="learning rate")

    def merge(self, scope: Scope) -> None:
        matrices = self._matrices(scope)
        changes = self._changes(matrices) if matrices.names else []
        facts = (scope.decided or self._limits(matrices, changes)) if matrices.names else {}
        moved = dict(zip(matrices.names, changes, strict=True))
        for part in scope.parts():
            if part.names[0] in moved:
                merged = self._sum(part, moved[part.names[0]], facts["thresholds"])
                part.out[0].copy_(merged.view(part.out[0].shape))
            else:
                part.copy(part.base)

    def decide(self, scope: Scope) -> dict[str, Any]:
        """Thresholds over the matrices; `trim` "after" takes all steps for it."""
        matrices = self._matrices(scope)
        if not matrices.names:
            return {"thresholds": []}
        return self._limits(matrices, self._changes(matrices) if self.trim == "after" else [])

    def _matrices(self, scope: Scope) -> Scope:
        known = [i for i, name in enumerate(scope.names) if self._is_matrix(name, scope.base[i])]
        return scope.of_tensors(known)

    def _changes(self, matrices: Scope) -> list[Tensor]:
        if self.nonfinite == "error":
            matrices.check_finite()
        vectors = [TaskVectors(part, self.nonfinite == "drop") for part in matrices.parts()]
        lost = [self.nonfinite == "propagate" and not each.are_finite for each in vectors]  # as in the whole family
        return [
            torch.full_like(each.origin, torch.nan) if is_lost else self._merged(each)
            for each, is_lost in zip(vectors, lost, strict=True)
        ]

    def _limits(self, matrices: Scope, changes: Sequence[Tensor]) -> dict[str, Any]:
        base, experts = matrices.base, matrices.flat_experts
        if self.trim == "after":
            pairs = zip(base, changes, strict=True)
            base = [tensor.to(change.dtype) - change.view(tensor.shape) for tensor, change in pairs]
            experts = [expert.to(matrices.compute) for expert in experts]
        densities = arguments.per_expert("density", self.density, matrices.num_tasks)
        thresholds, _ = torch.ops.surgery_kernels.trim_limits(
            base, experts, densities, semantics="paper", nonfinite=self.nonfinite, names=matrices.names
        )
        return {"thresholds": thresholds.tolist()}

    def _sum(self, part: Scope, change: Tensor, thresholds: Sequence[float]) -> Tensor:
        vectors = TaskVectors(part, self.nonfinite == "drop")
        total = vectors.origin + torch.where(change.isnan(), torch.nan, 0.0)
        for t, (vector, threshold) in enumerate(zip(vectors, thresholds, strict=True)):
            # as the thresholds were found
            ranked = vector if self.trim == "before" else vectors.matrix(part.experts[0][t]) - (vectors.origin - change)
            total += self._scale(vector) * torch.where(ranked.abs() >= threshold, vector + change, 0.0)
        return total

    def _scale(self, vector: Tensor) -> float:
        norm = float(torch.linalg.vector_norm(vector))
        return self.lam / norm if norm else 0.0

    def _merged(self, vectors: TaskVectors) -> Tensor:
        """The change that all task vectors are given: minimises, row by row of v_j = tau_j,
        sum_j <v_j, v_j - sum_t lam_t (v_t + change)>^2.  # [rows, columns]"""
        k = max(1, vectors.rank // len(vectors))
        parts = [vector for vector in vectors if bool(vector.any())]
        change = torch.zeros_like(vectors.origin)
        if not parts:
            return change
        scales = [self._scale(vector) for vector in parts]
        lefts = torch.cat([Leading.of(vector, k).left for vector in parts], dim=1)
        shared_directions = Leading.of(lefts, min(vectors.rank // self.subspace, lefts.shape[1])).left
        stacked = torch.stack(parts, dim=1)  # [rows, n, columns]
        total = torch.tensor(scales, dtype=change.dtype, device=change.device) @ stacked
        own = ((stacked - total[:, None]) * stacked).sum(-1)  # [rows, n]
        together = sum(scales)
        optimizer = torch.optim.Adam([change], lr=self.lr)
        for _ in range(self.steps):
            residual = own - together * (stacked @ change[:, :, None]).squeeze(-1)
            gradient = -2 * together * (residual[:, None] @ stacked).squeeze(1)
            change.grad = gradient - shared_directions @ (shared_directions.mT @ gradient)
            optimizer.step()
        return change.detach()
