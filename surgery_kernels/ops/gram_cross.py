"""Gram matrices of feature rows, and their products with other features, from one read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments

_ops = torch.ops.surgery_kernels


class GramCross(NamedTuple):
    """Sums over the rows of each task; those of y are None without y."""

    gram: Tensor  # [num_tasks, dim, dim], symmetric to the bit
    cross: Tensor | None  # [num_tasks, dim, y_dim]
    x_sums: Tensor  # [num_tasks, dim]
    y_sums: Tensor | None  # [num_tasks, y_dim]


def gram_cross(
    x: Tensor,
    y: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> GramCross:
    """``x^T W x``, ``x^T W y`` and the sums of the rows of ``W x`` and ``W y``, task by task; W holds the weights.

    One read of x and y, and half of the products of the symmetric matrix. Rows are added up in runs of 512, and the
    runs one after the other: on the CPU results do not depend on the number of threads or of tasks; those of two
    instruction sets differ by rounding. On CUDA the products are torch's, with its setting
    ``torch.backends.cuda.matmul.fp32_precision``.

    Args:
        x: [num_tasks, rows, dim], or with `offsets` [rows, dim]; float64, float32, float16 or bfloat16. Any strides
            with the last one 1; others are copied first.
        y: Alike, with a width of its own; None: products of x alone.
        weights: One per row, [num_tasks, rows] or [rows], float32 or float64. A row of weight 0 takes no part,
            whatever it holds.
        offsets: num_tasks + 1 numbers that rise from 0 to rows: task t has the rows from ``offsets[t]`` to
            ``offsets[t + 1]``, none if they are equal.
        dtype: What is multiplied and added: float32 or float64; None: float64 for float64 inputs, else float32.

    Returns:
        In `dtype`. Zeros for a task without rows; NaN or infinity in a row reaches its columns. Carries no gradient.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices do not fit.

    Source: the normal equations of RegMean (arXiv 2212.09849), FeatCal (arXiv 2605.13030) and linear surgery.
    """
    _check(x, y, offsets)
    wide = x.dtype == torch.float64
    if dtype is not None:
        if dtype not in (torch.float32, torch.float64) or (wide and dtype == torch.float32):
            wanted = "float64 for float64 features" if wide else "float32 or float64"
            raise ValueError(f"dtype must be {wanted}, got {dtype}")
        wide = dtype == torch.float64
    if weights is not None:
        _check_weights(weights, x)
        weights = weights.detach().to(torch.float64 if wide else torch.float32)
    gram, cross, x_sums, y_sums = _ops.gram_cross(
        x.detach(), None if y is None else y.detach(), weights, None if offsets is None else list(offsets), wide
    )
    return GramCross(gram, None, x_sums, None) if y is None else GramCross(gram, cross, x_sums, y_sums)


def _check(x: Tensor, y: Tensor | None, offsets: Sequence[int] | None) -> None:
    axes = ("num_tasks", "rows") if offsets is None else ("rows",)
    for name, tensor in [("x", x)] if y is None else [("x", x), ("y", y)]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != len(axes) + 1:
            raise ValueError(f"{name} must be [{', '.join((*axes, 'dim'))}], got {tuple(tensor.shape)}")
        if tensor.dtype not in arguments.DTYPES:
            raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
        if tensor.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"{name} must have the rows of x, {tuple(x.shape[:-1])}, got {tuple(tensor.shape[:-1])}")
    if offsets is None:
        return
    if isinstance(offsets, Tensor) or not all(isinstance(place, (int, torch.SymInt)) for place in offsets):
        raise TypeError(f"offsets must be a list of integers, got {offsets!r}")
    rises = all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
    if not offsets or offsets[0] != 0 or offsets[-1] != len(x) or not rises:
        raise ValueError(f"offsets must rise from 0 to the rows of x, {len(x)}, got {list(offsets)}")


def _check_weights(weights: Tensor, x: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights must be float32 or float64, got {weights.dtype}")
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"weights must be {list(x.shape[:-1])}, one for every row of x, got {list(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"weights must be on the device of x, {x.device}, got {weights.device}")


@torch.library.register_fake("surgery_kernels::gram_cross")
def _(
    x: Tensor,
    y: Tensor | None = None,
    weights: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tasks = x.shape[0] if offsets is None else len(offsets) - 1
    dim, y_dim = x.shape[-1], 0 if y is None else y.shape[-1]
    dtype = torch.float64 if wide else torch.promote_types(x.dtype, torch.float32)
    shapes = ((num_tasks, dim, dim), (num_tasks, dim, y_dim), (num_tasks, dim), (num_tasks, y_dim))
    gram, cross, x_sums, y_sums = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return gram, cross, x_sums, y_sums
