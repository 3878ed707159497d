"""Linear maps from features to how far they are from others: ridge regression, of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import gram_cross

# Ridges that leaving one row out chooses among, as shares of the mean variance of the features.
RIDGES = tuple(10.0 ** (k / 2) for k in range(-6, 7))


@dataclass(frozen=True)
class Map:
    """``features -> features @ matrix + shift``, the part of `matrix` that has the wanted rank."""

    down: Tensor  # [rank, dim]
    up: Tensor  # [dim, rank]; of full rank, where it is the identity, [dim, 0]
    shift: Tensor  # [dim]


class Moments:
    """Weighted means and covariances of features and of their distances to others, from rows in any number of calls.

    Rows are moved by the mean of the first call before they are multiplied: what is subtracted later is then small.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._noise = 0.0
        self._centers: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, features: Tensor, distances: Tensor, weights: Tensor | None = None) -> None:
        """features, distances: [rows, dim] of one dtype; weights: [rows], 0 or greater."""
        if weights is not None and not weights.any():
            return
        if self._centers is None:
            there = slice(None) if weights is None else weights > 0
            self._centers = features[there].mean(0), distances[there].mean(0)
            self._noise = _noise(features)
        x, y = (rows - center for rows, center in zip((features, distances), self._centers, strict=True))
        weights = None if weights is None else weights[None].to(torch.promote_types(x.dtype, torch.float32))
        gram, cross, x_sums, y_sums = gram_cross(x[None], y[None], weights=weights)
        assert cross is not None and y_sums is not None
        sums = [sum_of[0].double() for sum_of in (gram, cross, x_sums, y_sums)]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.weight += float(len(x) if weights is None else weights.double().sum())

    def problem(self) -> Problem:
        assert self._centers is not None
        gram, cross, x_sums, y_sums = self._sums
        x_mean, y_mean = x_sums / self.weight, y_sums / self.weight
        gram = gram / self.weight - torch.outer(x_mean, x_mean)
        cross = cross / self.weight - torch.outer(x_mean, y_mean)
        x_mean, y_mean = (a + b.double() for a, b in zip((x_mean, y_mean), self._centers, strict=True))
        return Problem(gram, cross, x_mean, y_mean, self._noise)


@dataclass(frozen=True)
class Problem:
    """Moments about the means, float64."""

    gram: Tensor  # [dim, dim]
    cross: Tensor  # [dim, dim]
    x_mean: Tensor  # [dim]
    y_mean: Tensor
    noise: float  # standard deviation that rounding alone may give, as a share of the mean

    @property
    def mean(self) -> float:
        """The mean variance of the features."""
        return float(self.gram.diagonal().mean())

    @property
    def varies(self) -> bool:
        return self.mean > float((self.noise * self.x_mean).square().mean())


def solve(problems: Sequence[Problem], ridges: Sequence[float], rank: int) -> list[Map]:
    """Of each problem the map of its rank with the least squared error, where `ridge` times the mean variance is added
    to every variance. Of features that never change it is the mean distance alone.

    All are decomposed together: (gram + ridge) = L L^T, and the first axes of what the whole matrix predicts.
    """
    dim = len(problems[0].gram)
    eye = torch.eye(dim, dtype=torch.float64, device=problems[0].gram.device)
    damped = [p.gram + ridge * p.mean * eye if p.varies else eye for p, ridge in zip(problems, ridges, strict=True)]
    wanted = [p.cross if p.varies else torch.zeros_like(p.cross) for p in problems]
    matrices = torch.cholesky_solve(torch.stack(wanted), torch.linalg.cholesky(torch.stack(damped))).unbind()
    if rank >= dim:
        return [
            Map(matrix.T, matrix.new_empty(dim, 0), p.y_mean - p.x_mean @ matrix)
            for p, matrix in zip(problems, matrices, strict=True)
        ]
    # Of matrix^T (gram + ridge) matrix the last eigenvectors: the first right singular vectors in that metric.
    predicted = torch.stack([p.cross.T @ matrix for p, matrix in zip(problems, matrices, strict=True)])
    vectors = torch.linalg.eigh((predicted + predicted.mT) / 2).eigenvectors
    maps = []
    for p, matrix, axes in zip(problems, matrices, vectors[..., -rank:].flip(-1), strict=True):
        down = (matrix @ axes).T
        maps.append(Map(down, axes, p.y_mean - axes @ (down @ p.x_mean)))
    return maps


def of_few(features: Tensor, distances: Tensor, ridge: float | None) -> tuple[Problem, float]:
    """The problem of single rows [rows, dim], as the final representation has them. Without a ridge that of RIDGES is
    taken whose predictions are best for rows that were left out; it grows as the rows get fewer."""
    x, y = features.double(), distances.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    problem = Problem(gram, cross, x_mean, y_mean, _noise(features))
    return problem, _chosen(x, y, gram, cross) if ridge is None else ridge


def _noise(features: Tensor) -> float:
    return 16 * torch.finfo(torch.promote_types(features.dtype, torch.float32)).eps


def _chosen(x: Tensor, y: Tensor, gram: Tensor, cross: Tensor) -> float:
    """Every row's error under the map of the others follows from its own: error / (1 - its share in its prediction)."""
    variances, axes = torch.linalg.eigh(gram)
    variances = variances.clamp_min(0)
    coordinates, of_axes = x @ axes, axes.T @ cross
    mean = float(variances.mean())

    def left_out(ridge: float) -> float:
        damped = variances + ridge * mean
        if mean == 0 or len(x) < 3:
            return -ridge  # rows that say nothing: the most there is
        share = 1 / len(x) + (coordinates.square() / damped).sum(1) / len(x)
        errors = (y - coordinates @ (of_axes / damped[:, None])) / (1 - share)[:, None]
        return float(errors.square().sum())

    return min(RIDGES, key=left_out)
