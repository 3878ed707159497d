"""Methods that keep leading singular directions of task vectors, or make them alike: TSV-M, Iso-C, Iso-CTS, CART."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....ops.polar import polar
from ...method import SHARE, SHARE_ABOVE_0, shared
from ...scope import Scope
from .family import Leading, Spectral, TaskVectors


@dataclass(frozen=True)
class TsvM(Spectral):
    """Adds the leading singular directions of every task vector, made orthogonal to those of the others.

    Every expert gets an equal share of the rank, one direction at least. Where directions of several experts coincide
    they count once.
    """

    name = "tsv_m"
    title = "TSV-M"
    formula = "base + lam * polar([U_1 .. U_n]) diag(s) polar([V_1 .. V_n]^T), U_t s_t V_t^T: leading r / n of tau_t"
    source = "Task Singular Vectors (arXiv 2412.00081)"

    @property
    def reads(self) -> int:
        return 1

    def _merged(self, vectors: TaskVectors) -> Tensor:
        if len(vectors) == 1:
            return vectors.sum()
        k = max(1, vectors.rank // len(vectors))
        parts = Leading.side_by_side([Leading.of(vector, k) for vector in vectors])
        return (polar(parts.left)[0] * parts.values) @ polar(parts.right)[0]


@dataclass(frozen=True)
class IsoC(Spectral):
    """Adds the sum of the task vectors with all singular values set to their mean.

    One expert alone is changed too. Directions that the sum does not have, as where LoRAs are merged, stay out of the
    result; `of_rank` leaves their zeros out of the mean as well.
    """

    name = "iso_c"
    title = "Iso-C"
    formula = "base + lam * mean(S) U V^T, U S V^T = sum_t tau_t"
    source = "No Task Left Behind: isotropic merging (arXiv 2502.04959)"

    of_rank: bool = shared(False, kind=bool, meaning="the mean is that of the singular values that are not 0")

    @property
    def reads(self) -> int:
        return 1

    def _merged(self, vectors: TaskVectors) -> Tensor:
        factor, norm = polar(vectors.sum())
        # a partial isometry of rank k has the square norm k
        count = factor.square().sum().round().clamp(min=1) if self.of_rank else vectors.rank
        return factor * (norm / count)


@dataclass(frozen=True)
class IsoCts(Spectral):
    """Iso-C in the space that the experts share, with room left for directions of each expert's own.

    Where the room is too small for one direction each, it is Iso-C.
    """

    name = "iso_cts"
    title = "Iso-CTS"
    formula = "base + lam * mean(s) polar([U_1 .. U_n U]) polar([V_1 .. V_n V]^T), U, V: leading of sum_t tau_t"
    source = "No Task Left Behind: isotropic merging (arXiv 2502.04959)"

    common: float = shared(0.8, range=SHARE, meaning="share of the rank that is common to all experts")

    def _merged(self, vectors: TaskVectors) -> Tensor:
        count, rank = len(vectors), vectors.rank
        own = round((rank - int(rank * self.common)) / count)  # of each expert, half to even as in the authors' code
        own = min(own, rank // count)
        total = vectors.sum()
        common = Leading.of(total, rank - own * count)
        parts = [Leading.of(vector - common.left @ (common.left.mT @ vector), own) for vector in vectors if own]
        joined = Leading.side_by_side([*parts, common])
        mean = joined.values.sum() / rank
        return mean * polar(joined.left)[0] @ polar(joined.right)[0]


@dataclass(frozen=True)
class Cart(Spectral):
    """Adds the leading directions of every expert's distance to the mean of all, to that mean. The base is not read.

    Of two experts the distances cancel: the result is their mean.
    """

    name = "cart"
    title = "CART"
    formula = "mean + lam * sum_t SVD_k(expert_t - mean), k = rank * r"
    source = "Revisiting weight averaging for model merging (arXiv 2412.12153)"
    base = "none"

    rank: float = shared(0.16, range=SHARE_ABOVE_0, meaning="share of the rank that is kept, one direction at least")

    def _average(self, part: Scope) -> None:
        count = part.num_tasks
        part.mix([1.0] * count, divisor=count, task_vectors=False, nonfinite=self.nonfinite)

    def _merge_matrix(self, part: Scope) -> None:
        if self.nonfinite == "error":
            part.check_finite(task_vectors=False)
        mean = torch.zeros_like(part.out[0], dtype=part.compute)
        for expert in part.experts[0]:
            mean += torch.where(expert.isfinite(), expert, 0.0) if self.nonfinite == "drop" else expert
        super()._merge_matrix(replace(part, base=[mean / part.num_tasks]))

    def _merged(self, vectors: TaskVectors) -> Tensor:
        k = max(1, int(vectors.rank * self.rank))
        total = torch.zeros_like(vectors.origin)
        for vector in vectors:
            total += Leading.of(vector, k).product
        return total
