"""What methods share that look at a task vector as a matrix, and what they look at: task vectors, leading directions.

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

from ....ops.polar import TOLERANCE
from ...method import Method, nonfinite_policy, shared, task_vector_scale
from ...scope import Scope


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
        if self.nonfinite == "propagate" and not vectors.are_finite:
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
    def are_finite(self) -> bool:
        return all(bool(vector.isfinite().all()) for vector in self)

    @property
    def rank(self) -> int:
        """The most that a matrix can have."""
        return min(self.origin.shape)

    def sum(self) -> Tensor:
        """In the order of the experts, in one read where they lie in what is computed in."""
        total = torch.zeros_like(self.origin)
        if {tensor.dtype for tensor in self.part.inputs} == {self.part.compute}:
            known = "drop" if self.finite_only else "propagate"
            into = replace(self.part, out=[total.view(self.part.out[0].shape)])
            into.mix([1.0] * len(self), of_base=0.0, nonfinite=known)
            return total
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
