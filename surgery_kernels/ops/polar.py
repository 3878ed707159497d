"""The nearest matrix with orthonormal rows or columns, and the nuclear norm."""

from __future__ import annotations

import torch
from torch import Tensor

ELONGATED = 2  # times as long as wide: where the Gram matrix of the short side takes less time than a decomposition
TOLERANCE = 1e-6


def polar(matrices: Tensor, *, tol: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """``U V^T`` and ``sum(S)`` of every ``M = U S V^T``: the polar factor, and the nuclear norm.

    Made of products and decompositions of torch's, so it is differentiable and compiles; 4 m c r + 9 r^3 FLOPs of a
    matrix [m, c] (r: its short side), by the eigenvectors of its Gram matrix in float64; those of a decomposition for
    float64 less than twice as long as wide. Rounding moves a direction of singular value s, where the largest is 1, by
    about eps / s: as in a decomposition.

    Args:
        matrices: [..., m, c], float32 or float64, finite.
        tol: In [0, 1): singular values up to ``tol`` times the largest count as 0.

    Returns:
        [..., m, c] and [...], in the dtype of `matrices`. Directions whose singular value counts as 0 are 0: a matrix
        of rank k < r gives a partial isometry, the factor of smallest norm, and one of zeros or without entries zeros.
        Equal to rounding, not to the bit, on another machine or number of threads.

    Raises:
        ValueError, TypeError: wrong dimensions, dtype or `tol`.

    Source: Higham, Computing the polar decomposition (1986).
    """
    if not isinstance(matrices, Tensor):
        raise TypeError(f"matrices must be a tensor, got {type(matrices).__name__}")
    if matrices.dim() < 2:
        raise ValueError(f"matrices must have two dimensions or more, got shape {tuple(matrices.shape)}")
    if matrices.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"matrices must be float32 or float64, got {matrices.dtype}")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be in [0, 1), got {tol}")
    rows, columns = matrices.shape[-2:]
    if rows == 0 or columns == 0:
        return torch.zeros_like(matrices), matrices.new_zeros(matrices.shape[:-2])
    if matrices.dtype == torch.float64 and max(rows, columns) < ELONGATED * min(rows, columns):
        return _decomposed(matrices, tol)
    if rows > columns:
        factor, norm = _of_wide(matrices.mT, tol)
        return factor.mT, norm
    return _of_wide(matrices, tol)


def _decomposed(matrices: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    kept = values > tol * values[..., :1]
    return (left * kept[..., None, :]) @ right, (values * kept).sum(-1)


def _of_wide(matrices: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """(M M^T)^(-1/2) M, the factor in float64: a square has twice the digits of its singular value."""
    wide = matrices.double()
    squares, left = torch.linalg.eigh(wide @ wide.mT)
    values = squares.clamp(min=0).sqrt()
    kept = values > tol * values[..., -1:]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    whitening = (left * inverse[..., None, :]) @ left.mT
    return whitening.to(matrices.dtype) @ matrices, (values * kept).sum(-1).to(matrices.dtype)
