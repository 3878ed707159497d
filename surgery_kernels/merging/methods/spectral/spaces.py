"""Spaces that the task vectors of a matrix have in common, where they can be merged entry by entry.

From the factors of LoRAs nothing is made that is as large as a task vector: decompositions are of the size of all ranks
together, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...low_rank import LowRank

NEXT_TO_NONE = 1e-12  # of the largest singular value: rounding of float64
OF_SQUARES = 1e-7  # the same where the singular values are roots of eigenvalues


@dataclass(frozen=True)
class Space:
    """What the experts' task vectors are there, and the way back: ``left @ block @ right``."""

    blocks: list[Tensor]  # one of each expert
    left: Tensor | None = None  # [rows, k], orthonormal columns; None: the rows themselves
    right: Tensor | None = None  # [l, columns], orthonormal rows; None: the columns themselves
    transposed: bool = False

    def back(self, merged: Tensor) -> LowRank:
        assert self.left is not None
        if self.right is None:
            return LowRank(self.left, merged, self.transposed)
        return LowRank(self.left @ merged, self.right, self.transposed)


def knots_of_factors(experts: Sequence[LowRank], tol: float) -> Space:
    """U of ``[tau_1 .. tau_n] = U S [V_1 .. V_n]`` where S > tol; the blocks are S V_t.

    up_t down_t = Q R_t L_t^T Q_t^T with orthonormal columns of Q and Q_t: the decomposition is that of all R_t L_t^T.
    """
    wide = [expert.to(torch.float64) for expert in experts]
    left, upper = torch.linalg.qr(torch.cat([expert.up for expert in wide], dim=1))
    uppers = upper.split([expert.rank for expert in wide], dim=1)
    lowers = [torch.linalg.qr(expert.down.mT).R for expert in wide]
    reduced = torch.cat([r @ low.mT for r, low in zip(uppers, lowers, strict=True)], dim=1)
    u, s, _ = torch.linalg.svd(reduced, full_matrices=False)
    signs, kept = _signs(left @ u), s > tol
    u = (u * signs)[:, kept]
    blocks = [(u.mT @ r) @ expert.down for r, expert in zip(uppers, wide, strict=True)]
    return _narrowed(experts[0].up.dtype, blocks, left @ u, None, experts[0].transposed)


def knots_of_matrices(vectors: Sequence[Tensor], tol: float) -> Space:
    """The same of task vectors as matrices, from the eigenvectors of the smaller Gram matrix of all of them."""
    rows, columns = vectors[0].shape
    if rows <= len(vectors) * columns:
        gram = vectors[0].new_zeros(rows, rows, dtype=torch.float64)
        for vector in vectors:
            wide = vector.double()
            gram.addmm_(wide, wide.mT)
        squares, left = torch.linalg.eigh(gram)
    else:
        together = torch.cat([vector.double() for vector in vectors], dim=1)
        squares, right = torch.linalg.eigh(together.mT @ together)
        left = together @ (right / squares.clamp(min=0).sqrt().clamp(min=torch.finfo(torch.float64).tiny))
    values = squares.clamp(min=0).sqrt()
    kept = values > max(tol, OF_SQUARES * float(values.max())) if len(values) else values > tol
    left = left[:, kept].flip(-1)
    left = (left * _signs(left)).to(vectors[0].dtype)
    return Space([left.mT @ vector for vector in vectors], left)


def core_of_factors(experts: Sequence[LowRank]) -> Space:
    """U: left singular vectors of all up, side by side; V^T: right ones of all down, one above the other."""
    wide = [expert.to(torch.float64) for expert in experts]
    left = _left_singular(torch.cat([expert.up for expert in wide], dim=1))
    right = _left_singular(torch.cat([expert.down for expert in wide]).mT).mT
    blocks = [(left.mT @ expert.up) @ (expert.down @ right.mT) for expert in wide]
    return _narrowed(experts[0].up.dtype, blocks, left, right, experts[0].transposed)


def _left_singular(matrix: Tensor) -> Tensor:
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    kept = s > NEXT_TO_NONE * s.max() if len(s) else s > 0
    left = q @ u[:, kept]
    return left * _signs(left)


def _signs(left: Tensor) -> Tensor:
    """Which sign of singular vectors: the largest entry of each is positive, on every machine."""
    if not left.numel():
        return left.new_ones(left.shape[1])
    signs = left.gather(0, left.abs().argmax(0, keepdim=True))[0].sign()
    return torch.where(signs == 0, 1.0, signs)


def _narrowed(dtype: torch.dtype, blocks: list[Tensor], left: Tensor, right: Tensor | None, transposed: bool) -> Space:
    dtype = torch.promote_types(dtype, torch.float32)
    right = right if right is None else right.to(dtype)
    return Space([block.to(dtype) for block in blocks], left.to(dtype), right, transposed)
