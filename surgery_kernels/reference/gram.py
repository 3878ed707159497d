"""Dot products of task vectors, added up in the order that every backend keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scope import Experts, one_tensor_scope
from .sums import BLOCK, LANES, fold_halves

RUN = 4_096  # elements of a column that are added one after the other


def gram(
    base: Tensor | None,
    experts: Experts,
    *,
    axis: str = "tensor",
    rounded: bool = False,
    nonfinite: str = "error",
) -> Tensor:
    """<expert_i - base, expert_j - base> in float64: arguments and results as of `surgery_kernels.gram`."""
    products = scope_gram(*one_tensor_scope(base, experts), axis=axis, rounded=rounded, nonfinite=nonfinite)
    return products[0] if axis == "tensor" else products


def scope_gram(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    *,
    axis: str = "tensor",
    rounded: bool = False,
    nonfinite: str = "error",
) -> Tensor:
    """The same of several tensors; an expert is a list of them.  # [num_vectors, num_tasks, num_tasks]"""
    products = []
    for i, first in enumerate(experts[0]):
        compute = torch.promote_types(first.dtype, torch.float32)
        vectors = torch.stack([expert[i].to(compute) for expert in experts])  # [num_tasks, *shape]
        if bases is not None:
            vectors = vectors - bases[i].to(compute)
        if rounded:
            vectors = vectors.to(first.dtype).to(compute)
        if nonfinite == "drop":
            vectors = torch.where(vectors.isfinite(), vectors, 0.0)
        for t, vector in enumerate(vectors):
            if nonfinite == "error" and (count := int((~vector.isfinite()).sum())):
                raise RuntimeError(f"experts[{t}] must be finite, got {count} NaN or infinite values")
        products.append(_products(vectors.double(), axis))
    of_vectors = torch.cat(products)
    return _fold(of_vectors)[None] if axis == "model" else of_vectors


def _fold(x: Tensor) -> Tensor:
    """Along the first dimension."""
    return fold_halves(x.movedim(0, -1))


def _products(vectors: Tensor, axis: str) -> Tensor:
    """Of one tensor.  # vectors: [num_tasks, *shape], result: [num_vectors, num_tasks, num_tasks]"""
    num_tasks, shape = len(vectors), vectors.shape[1:]
    if axis == "column" and len(shape) > 1:
        columns = vectors.reshape(num_tasks, shape[0], shape[1:].numel())
        return _fold(torch.stack([_add_up(run) for run in columns.split(RUN, dim=1)])).permute(2, 0, 1)
    if axis == "row" and len(shape) > 1:
        rows = vectors.reshape(num_tasks, shape[:-1].numel(), shape[-1])
    else:
        rows = vectors.reshape(num_tasks, 1, shape.numel())
    count, steps = rows.shape[1], -(-rows.shape[2] // LANES)
    padded = torch.nn.functional.pad(rows, (0, steps * LANES - rows.shape[2]))
    # the lanes of a block are columns of its own
    lanes = padded.unflatten(2, (steps, LANES)).transpose(1, 2).flatten(2)  # [num_tasks, steps, count * LANES]
    blocks = torch.stack([_add_up(block) for block in lanes.split(BLOCK // LANES, dim=1)])
    return _fold(fold_halves(blocks.unflatten(3, (count, LANES)))).permute(2, 0, 1)


def _add_up(columns: Tensor) -> Tensor:
    """The products of columns, one element after the other.  # [num_tasks, length, n] -> [num_tasks, num_tasks, n]"""
    num_tasks, _, count = columns.shape
    total = columns.new_zeros(num_tasks, num_tasks, count)
    for step in columns.unbind(1):
        total = total + step[:, None] * step[None]
    return total
