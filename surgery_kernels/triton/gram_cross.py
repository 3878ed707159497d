"""gram_cross on CUDA tensors: matrix products of torch, which there are cuBLAS's; no kernel of its own.

The columns of x are cut into strips, each multiplied with those from itself on: little more than half of the products
of the symmetric matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRIP = 512  # columns: wide enough for the rate of a large product


def gram_cross(
    x: Tensor,
    y: Tensor | None = None,
    weights: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As of `csrc/ops.cpp`. Features of 16 bits are multiplied as they are, unless weights have to be exact."""
    num_tasks = len(x) if offsets is None else len(offsets) - 1
    compute = torch.float64 if wide else torch.promote_types(x.dtype, torch.float32)
    dim, y_dim = x.shape[-1], 0 if y is None else y.shape[-1]
    gram, cross = (x.new_zeros(num_tasks, dim, width, dtype=compute) for width in (dim, y_dim))
    x_sums, y_sums = (x.new_zeros(num_tasks, width, dtype=compute) for width in (dim, y_dim))
    y = x.new_empty((*x.shape[:-1], 0)) if y is None else y

    def rows_of(tensor: Tensor, task: int) -> Tensor:
        return tensor[task] if offsets is None else tensor[offsets[task] : offsets[task + 1]]

    for t in range(num_tasks):
        x_rows, y_rows = rows_of(x, t), rows_of(y, t)
        narrow = weights is None and not wide and x.is_cuda
        if not narrow:
            x_rows, y_rows = x_rows.to(compute), y_rows.to(compute)
        weighted, weighted_y = x_rows, y_rows
        if weights is not None:
            weight = rows_of(weights, t)[:, None]
            x_rows, y_rows = (torch.where(weight == 0, 0, rows) for rows in (x_rows, y_rows))
            weighted, weighted_y = weight * x_rows, weight * y_rows
        for begin in range(0, dim, STRIP):
            strip = weighted[:, begin : begin + STRIP].T
            gram[t, begin : begin + STRIP, begin:] = _product(strip, x_rows[:, begin:], compute)
            cross[t, begin : begin + STRIP] = _product(strip, y_rows, compute)
        torch.sum(weighted, dim=0, dtype=compute, out=x_sums[t])
        torch.sum(weighted_y, dim=0, dtype=compute, out=y_sums[t])
    upper = gram.triu()
    return upper + upper.triu(1).mT, cross, x_sums, y_sums


def _product(a: Tensor, b: Tensor, compute: torch.dtype) -> Tensor:
    return a @ b if a.dtype == compute else torch.mm(a, b, out_dtype=compute)
