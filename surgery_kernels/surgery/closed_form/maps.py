"""Linear maps from features to how far they are from others: ridge regression, of low rank."""

from __future__ import annotations

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
        self._noise = 0.0  # standard deviation that rounding alone may give, as a share of the mean
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

    def solve(self, rank: int, ridge: float) -> Map:
        """The map of the least squared error, with `ridge` times the mean variance added to every variance.

        Of features that never change it is the mean distance alone.
        """
        assert self._centers is not None
        gram, cross, x_sums, y_sums = self._sums
        x_mean, y_mean = x_sums / self.weight, y_sums / self.weight
        gram = gram / self.weight - torch.outer(x_mean, x_mean)
        cross = cross / self.weight - torch.outer(x_mean, y_mean)
        x_mean, y_mean = (a + b.double() for a, b in zip((x_mean, y_mean), self._centers, strict=True))
        return _map(_solved(gram, cross, ridge, self._noise * x_mean), cross, rank, x_mean, y_mean)


def map_of_few(features: Tensor, distances: Tensor, rank: int, ridge: float | None) -> Map:
    """Of single rows [rows, dim], as the final representation has them. Without a ridge that of RIDGES is taken whose
    predictions are best for rows that were left out; it grows as the rows get fewer."""
    x, y = features.double(), distances.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    if ridge is None:
        ridge = _chosen(x, y, gram, cross)
    return _map(_solved(gram, cross, ridge, _noise(features) * x_mean), cross, rank, x_mean, y_mean)


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


def _solved(gram: Tensor, cross: Tensor, ridge: float, noise: Tensor) -> Tensor:
    """(gram + ridge * its mean variance)^-1 cross; 0 where the features vary by no more than `noise`.  # [dim, dim]"""
    mean = float(gram.diagonal().mean())
    if mean <= float(noise.square().mean()):
        return torch.zeros_like(cross)
    damped = gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))


def _map(matrix: Tensor, cross: Tensor, rank: int, x_mean: Tensor, y_mean: Tensor) -> Map:
    """The best of its rank: on the first axes of what the whole matrix predicts."""
    if rank >= len(matrix):
        return Map(matrix.T, matrix.new_empty(len(matrix), 0), y_mean - x_mean @ matrix)
    # Of matrix^T (gram + ridge) matrix the last eigenvectors: the first right singular vectors in that metric.
    predicted = cross.T @ matrix
    axes = torch.linalg.eigh((predicted + predicted.T) / 2).eigenvectors[:, -rank:].flip(1)
    down = (matrix @ axes).T
    return Map(down, axes, y_mean - axes @ (down @ x_mean))
