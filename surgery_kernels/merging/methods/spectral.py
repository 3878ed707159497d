"""Methods that look at a task vector as a matrix, by its singular vectors: TSV-M, Iso-C, Iso-CTS, CART, WUDI.

Task vectors are taken one at a time, in float32 or wider; only their leading directions, or their sums, are held. What
is not a matrix is averaged. Results are rounded once, and are those of another machine to rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ...ops.polar import TOLERANCE, polar
from ..method import ABOVE_0, SHARE, SHARE_ABOVE_0, Method, nonfinite_policy, shared, task_vector_scale
from ..scope import Scope


@dataclass(frozen=True)
class Spectral(Method):
    """What the family shares.

    Args:
        exclude: Patterns (``fnmatch``) of the names of matrices that are averaged like vectors, as embeddings
            ("*embed*") or CLIP's projections ("*text_projection*").
        convolutions: Whether kernels [out, in, ...] are matrices [out, in * ...] too.
    """

    decides = "tensor"

    lam: float = task_vector_scale()
    exclude: tuple[str, ...] = shared((), kind=object, key=None, meaning="patterns of names that are averaged")
    convolutions: bool = shared(False, kind=bool, meaning="kernels of convolutions are matrices too")
    nonfinite: str = nonfinite_policy()

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise TypeError(f"exclude must be a sequence of patterns, got {self.exclude!r}")

    def merge(self, scope: Scope) -> None:
        for part in scope.parts():
            if self._is_matrix(part.names[0], part.out[0]):
                self._merge_matrix(part)
            else:
                self._average(part)

    def _is_matrix(self, name: str, tensor: Tensor) -> bool:
        known = tensor.dim() == 2 or (tensor.dim() > 2 and self.convolutions)
        return known and tensor.numel() > 0 and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _average(self, part: Scope) -> None:
        part.mix([self.lam / part.num_tasks] * part.num_tasks, nonfinite=self.nonfinite)

    def _merge_matrix(self, part: Scope) -> None:
        if self.nonfinite == "error":
            part.check_finite()
        vectors = TaskVectors(part, self.nonfinite == "drop")
        if self.nonfinite == "propagate" and not all(bool(vector.isfinite().all()) for vector in vectors):
            part.out[0].fill_(torch.nan)  # every entry of a singular vector depends on all of the matrix
            return
        merged = self._merged(vectors)
        part.out[0].copy_(torch.add(vectors.origin, merged, alpha=self.lam).view(part.out[0].shape))

    @abstractmethod
    def _merged(self, vectors: TaskVectors) -> Tensor:
        """What is scaled by `lam` and added to the origin.  # [rows, columns]"""


class TaskVectors:
    """The task vectors of one tensor as matrices, made when they are asked for."""

    def __init__(self, part: Scope, finite_only: bool) -> None:
        self.part, self.finite_only = part, finite_only
        self.origin = self.matrix(part.base[0])

    def matrix(self, tensor: Tensor) -> Tensor:
        """[rows, columns], in what is computed in."""
        return tensor.to(self.part.compute).reshape(tensor.shape[0], -1)

    def __len__(self) -> int:
        return self.part.num_tasks

    def __iter__(self) -> Iterator[Tensor]:
        for expert in self.part.experts[0]:
            vector = self.matrix(expert) - self.origin
            yield torch.where(vector.isfinite(), vector, 0.0) if self.finite_only else vector

    @property
    def rank(self) -> int:
        """The most that a matrix can have."""
        return min(self.origin.shape)

    def sum(self) -> Tensor:
        """In the order of the experts."""
        total = torch.zeros_like(self.origin)
        for vector in self:
            total += vector
        return total


@dataclass(frozen=True)
class Leading:
    """The leading part of a singular value decomposition; what counts as 0 is left out."""

    left: Tensor  # [rows, k]
    values: Tensor  # [k], descending
    right: Tensor  # [k, columns]

    @staticmethod
    def of(matrix: Tensor, k: int) -> Leading:
        """From the eigenvectors of the Gram matrix of the short side, in which small singular values lose their digits:
        taken in float64 where those are asked for too."""
        if matrix.shape[0] > matrix.shape[1]:
            turned = Leading.of(matrix.mT, k)
            return Leading(turned.right.mT, turned.values, turned.left.mT)
        precise = matrix.double() if 2 * k > len(matrix) else matrix
        left = torch.linalg.eigh(precise @ precise.mT).eigenvectors.flip(-1)[:, :k].to(matrix.dtype)
        right = left.mT @ matrix
        values = torch.linalg.vector_norm(right, dim=-1)
        kept = values > TOLERANCE * values.max() if k else values > 0
        return Leading(left[:, kept], values[kept], right[kept] / values[kept, None])

    @staticmethod
    def side_by_side(parts: list[Leading]) -> Leading:
        return Leading(
            torch.cat([part.left for part in parts], dim=1),
            torch.cat([part.values for part in parts]),
            torch.cat([part.right for part in parts]),
        )

    @property
    def product(self) -> Tensor:
        return (self.left * self.values) @ self.right


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


@dataclass(frozen=True)
class Wudi(Spectral):
    """Moves the sum of the task vectors towards what interferes least with each of them, by steps of Adam.

    The steps are few on purpose: their limit is another point. An expert that changed nothing takes no part.
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
