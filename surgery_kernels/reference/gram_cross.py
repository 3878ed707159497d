"""Gram matrices of feature rows and their products with others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gram_cross(
    x: Tensor,
    y: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """x^T W x, x^T W y and the sums of W x and W y of every task: arguments as of `surgery_kernels.gram_cross`."""
    compute = torch.promote_types(x.dtype, torch.float32) if dtype is None else dtype
    alone = y is None
    x, y = x.to(compute), x.new_empty((*x.shape[:-1], 0), dtype=compute) if y is None else y.to(compute)
    weights = x.new_ones(x.shape[:-1]) if weights is None else weights.to(compute)

    def tasks(rows: Tensor) -> Sequence[Tensor]:
        if offsets is None:
            return list(rows)
        return [rows[begin:end] for begin, end in zip(offsets, offsets[1:], strict=False)]

    of_tasks = []
    for x_rows, y_rows, of_rows in zip(tasks(x), tasks(y), tasks(weights), strict=True):
        there = of_rows != 0  # what is not there may hold anything
        x_rows, y_rows, weight = x_rows[there], y_rows[there], of_rows[there, None]
        weighted = weight * x_rows
        of_tasks.append((weighted.T @ x_rows, weighted.T @ y_rows, weighted.sum(0), (weight * y_rows).sum(0)))
    dim, y_dim = x.shape[-1], y.shape[-1]
    shapes = ((0, dim, dim), (0, dim, y_dim), (0, dim), (0, y_dim))
    results = [torch.stack(r) for r in zip(*of_tasks, strict=True)] or [x.new_empty(shape) for shape in shapes]
    gram, cross, x_sums, y_sums = results
    return (gram, None, x_sums, None) if alone else (gram, cross, x_sums, y_sums)
