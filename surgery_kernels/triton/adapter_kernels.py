"""The three kernels of surgery_adapter, what they multiply, and their tiles.

Tiles are tables, not tuned at run time: they decide the order of sums, so that a call gives the same bits every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapter_rows import places_of_task, row_of_task, row_offset, sample_block, task_block


class Tile(NamedTuple):
    """What one program holds of rows and dim, and how it is compiled."""

    rows: int
    dim: int
    num_warps: int
    num_stages: int


class Products(NamedTuple):
    """What tl.dot multiplies, and how."""

    operand: tl.dtype
    precision: str


EXACT = Products(tl.float32, "ieee")
TF32 = Products(tl.float32, "tf32")
BFLOAT16 = Products(tl.bfloat16, "ieee")
FLOAT64 = Products(tl.float64, "ieee")

# By products and block of ranks. Each program reads the whole adapter, so that programs take as many rows as leave one
# for every multiprocessor: 8 tasks x 16 x 50 tokens are 100 to 128 programs of 64 rows. Exact products run on the
# ordinary units, which hold their operands in registers: there tiles are narrow along what is summed. No program takes
# more than 99 KB of shared memory, which every GPU since sm_80 has.
ROWS_TILES = {
    EXACT: {16: Tile(64, 32, 4, 3), 32: Tile(64, 32, 8, 3), 64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2)},
    TF32: {16: Tile(64, 64, 4, 3), 32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2)},
    BFLOAT16: {16: Tile(64, 64, 4, 4), 32: Tile(64, 64, 4, 3), 64: Tile(64, 64, 8, 3), 128: Tile(64, 32, 8, 3)},
    FLOAT64: {rank: Tile(16, 32, 4, 1) for rank in (16, 32, 64, 128)},
}
# Two sums [rank, dim] in registers, over the rows of a task: 8 tasks of dim 768 are 96 programs. Wider tiles would read
# hidden less often, and leave more multiprocessors without work.
ADAPTER_TILES = {
    EXACT: {16: Tile(16, 64, 4, 3), 32: Tile(16, 64, 4, 3), 64: Tile(16, 64, 8, 3), 128: Tile(16, 32, 8, 1)},
    TF32: {16: Tile(32, 64, 4, 4), 32: Tile(32, 64, 4, 3), 64: Tile(32, 64, 8, 3), 128: Tile(32, 32, 8, 2)},
    BFLOAT16: {16: Tile(64, 64, 4, 3), 32: Tile(64, 64, 4, 2), 64: Tile(32, 64, 8, 3), 128: Tile(32, 32, 8, 2)},
    FLOAT64: {rank: Tile(16, 16, 4, 1) for rank in (16, 32, 64, 128)},
}


def tf32_is_wanted() -> bool:
    """Whichever name torch was asked by; to read the older one, `allow_tf32`, raises where it was the newer."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def products_of(features: Tensor, adapter: Tensor) -> Products:
    """bfloat16 for bfloat16 adapters; else TF32, which neither overflows nor loses a digit of a 16-bit feature, where
    anything is 16-bit or torch is asked for it."""
    if features.dtype == torch.float64:
        return FLOAT64
    if adapter.dtype == torch.bfloat16:
        return BFLOAT16
    exact = features.dtype == adapter.dtype == torch.float32 and not tf32_is_wanted()
    return EXACT if exact else TF32


@triton.jit
def _load_factor(factor, d, r, d_stride, r_stride, dim, rank, known, OPERAND: tl.constexpr):
    """A tile [dim, rank] of down^T or up, of a task that exists."""
    mask = (d[:, None] < dim) & (r[None, :] < rank) & known
    return tl.load(factor + d[:, None] * d_stride + r[None, :] * r_stride, mask=mask, other=0.0).to(OPERAND)


@triton.jit
def _load_gradient(grad, grad_means, rows, mean_rows, d, mask, mean_mask, share, ACCUMULATE: tl.constexpr):
    """What reaches corrected rows: their own gradient, and their share of that of their sample's mean."""
    if grad is None:
        gradient = tl.zeros(mask.shape, dtype=ACCUMULATE)
    else:
        gradient = tl.load(grad + rows[:, None] + d[None, :], mask=mask, other=0.0).to(ACCUMULATE)
    if grad_means is not None:
        gradient += tl.load(grad_means + mean_rows + d[None, :], mask=mean_mask, other=0.0) * share
    return gradient


@triton.jit
def forward_kernel(
    features, down, up, bias, corrected, means, hidden, features_strides, corrected_strides,
    task_index, order, bounds, num_tasks, samples, tokens, dim, rank, blocks,
    BY_SAMPLE: tl.constexpr, TASKS: tl.constexpr, THROUGH_MEMORY: tl.constexpr, RELU: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RANK: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """corrected = features - relu(features down^T) up^T - bias of some rows of one task, and their part of the mean.

    Bound: 2 rows dim s bytes of memory and 4 rows dim rank FLOPs. Out of the cache come rows dim s bytes more, where a
    row is read the second time, and 2 rank dim numbers of its adapter for each program.
    """
    if BY_SAMPLE:
        task, known, sample, token, there = sample_block(task_index, tokens, samples, num_tasks, blocks, BLOCK)
    else:
        task, known, sample, token, there = task_block(order, bounds, tokens, samples, num_tasks, blocks, BLOCK, TASKS)
    adapter = task.to(tl.int64) * rank * dim
    rows = features + row_offset(sample, token, samples, features_strides)
    hidden_rows = (sample.to(tl.int64) * tokens + token) * rank
    d = tl.arange(0, BLOCK_DIM)

    activation = tl.zeros((BLOCK, BLOCK_RANK), dtype=ACCUMULATE)
    for first in range(0, rank if THROUGH_MEMORY else 1, BLOCK_RANK):  # once, unless the ranks are too many
        r = first + tl.arange(0, BLOCK_RANK)
        activation = tl.zeros((BLOCK, BLOCK_RANK), dtype=ACCUMULATE)
        for start in range(0, dim, BLOCK_DIM):
            mask = there[:, None] & (start + d[None, :] < dim)
            x = tl.load(rows[:, None] + start + d[None, :], mask=mask, other=0.0).to(OPERAND)
            factor = _load_factor(down + adapter, start + d, r, 1, dim, dim, rank, known, OPERAND)
            activation = tl.dot(x, factor, activation, input_precision=PRECISION, out_dtype=ACCUMULATE)
        if RELU:
            activation = tl.where(activation <= 0, 0.0, activation)  # NaN stays
        activation = tl.where(known, activation, float("nan"))
        if hidden is not None:
            mask = there[:, None] & (r[None, :] < rank)
            tl.store(hidden + hidden_rows[:, None] + r[None, :], activation, mask=mask)
    if THROUGH_MEMORY:
        tl.debug_barrier()  # other threads of the program wrote what is read below

    results = corrected + row_offset(sample, token, samples, corrected_strides)
    for start in range(0, dim, BLOCK_DIM):
        correction = tl.zeros((BLOCK, BLOCK_DIM), dtype=ACCUMULATE)
        for first in range(0, rank if THROUGH_MEMORY else 1, BLOCK_RANK):
            r = first + tl.arange(0, BLOCK_RANK)
            if THROUGH_MEMORY:
                mask = there[:, None] & (r[None, :] < rank)
                activation = tl.load(hidden + hidden_rows[:, None] + r[None, :], mask=mask, other=0.0)
            factor = _load_factor(up + adapter, start + d, r, rank, 1, dim, rank, known, OPERAND)
            correction = tl.dot(
                activation.to(OPERAND), tl.trans(factor), correction, input_precision=PRECISION, out_dtype=ACCUMULATE
            )
        mask = there[:, None] & (start + d[None, :] < dim)
        x = tl.load(rows[:, None] + start + d[None, :], mask=mask, other=0.0).to(ACCUMULATE)
        if bias is not None:
            of_task = bias + task.to(tl.int64) * dim
            x -= tl.load(of_task + start + d, mask=(start + d < dim) & known, other=0.0)[None, :]
        tl.store(results[:, None] + start + d[None, :], x - correction, mask=mask)
        if means is not None:
            part = tl.sum(tl.where(mask, x - correction, 0.0), axis=0) / tokens
            at = tl.program_id(0).to(tl.int64) * dim + start + d
            tl.store(means + at, part, mask=start + d < dim)


@triton.jit
def backward_rows_kernel(
    grad, grad_means, down, up, hidden, d_hidden, d_features, grad_strides, d_features_strides,
    task_index, order, bounds, num_tasks, samples, tokens, dim, rank, blocks,
    BY_SAMPLE: tl.constexpr, TASKS: tl.constexpr, THROUGH_MEMORY: tl.constexpr, RELU: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RANK: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_hidden = -(grad up) * [hidden > 0] and d_features = grad + d_hidden down of some rows of one task.

    Bound: as of the forward, with grad in the place of features, and 8 rows rank bytes of hidden and d_hidden.
    """
    if BY_SAMPLE:
        task, known, sample, token, there = sample_block(task_index, tokens, samples, num_tasks, blocks, BLOCK)
    else:
        task, known, sample, token, there = task_block(order, bounds, tokens, samples, num_tasks, blocks, BLOCK, TASKS)
    adapter = task.to(tl.int64) * rank * dim
    grad_rows = row_offset(sample, token, samples, grad_strides)
    mean_row = (tl.program_id(0) // blocks).to(tl.int64) * dim  # where there are means, all rows are of one sample
    hidden_rows = (sample.to(tl.int64) * tokens + token) * rank
    d = tl.arange(0, BLOCK_DIM)
    share = tl.full((1, 1), 1, ACCUMULATE) / tokens

    change = tl.zeros((BLOCK, BLOCK_RANK), dtype=ACCUMULATE)
    for first in range(0, rank if THROUGH_MEMORY else 1, BLOCK_RANK):  # once, unless the ranks are too many
        r = first + tl.arange(0, BLOCK_RANK)
        product = tl.zeros((BLOCK, BLOCK_RANK), dtype=ACCUMULATE)
        for start in range(0, dim, BLOCK_DIM):
            mask = there[:, None] & (start + d[None, :] < dim)
            gradient = _load_gradient(
                grad, grad_means, grad_rows, mean_row, start + d, mask, start + d[None, :] < dim, share, ACCUMULATE
            )
            factor = _load_factor(up + adapter, start + d, r, rank, 1, dim, rank, known, OPERAND)
            product = tl.dot(gradient.to(OPERAND), factor, product, input_precision=PRECISION, out_dtype=ACCUMULATE)
        mask = there[:, None] & (r[None, :] < rank)
        activation = tl.load(hidden + hidden_rows[:, None] + r[None, :], mask=mask, other=0.0)
        change = tl.where(activation <= 0, 0.0, -product) if RELU else -product
        change = tl.where(known, change, float("nan"))
        if d_hidden is not None:
            tl.store(d_hidden + hidden_rows[:, None] + r[None, :], change, mask=mask)
    if THROUGH_MEMORY:
        tl.debug_barrier()  # other threads of the program wrote what is read below

    if d_features is not None:
        results = d_features + row_offset(sample, token, samples, d_features_strides)
        for start in range(0, dim, BLOCK_DIM):
            mask = there[:, None] & (start + d[None, :] < dim)
            total = _load_gradient(
                grad, grad_means, grad_rows, mean_row, start + d, mask, start + d[None, :] < dim, share, ACCUMULATE
            )
            for first in range(0, rank if THROUGH_MEMORY else 1, BLOCK_RANK):
                r = first + tl.arange(0, BLOCK_RANK)
                if THROUGH_MEMORY:
                    of_ranks = there[:, None] & (r[None, :] < rank)
                    change = tl.load(d_hidden + hidden_rows[:, None] + r[None, :], mask=of_ranks, other=0.0)
                factor = _load_factor(down + adapter, start + d, r, 1, dim, dim, rank, known, OPERAND)
                total = tl.dot(
                    change.to(OPERAND), tl.trans(factor), total, input_precision=PRECISION, out_dtype=ACCUMULATE
                )
            tl.store(results[:, None] + start + d[None, :], total, mask=mask)


@triton.jit
def backward_adapter_kernel(
    grad, grad_means, features, hidden, d_hidden, d_down, d_up, d_bias, grad_strides, features_strides,
    order, bounds, num_tasks, samples, tokens, dim, rank, parts,
    BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RANK: tl.constexpr,
    OPERAND: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_down = d_hidden^T features and d_up = -grad^T hidden, for a tile [rank, dim] of one task and some of its rows.

    Bound: 2 rows dim s bytes, of which grad is still in a cache of 50 MB after the kernel before, and 4 rows dim rank
    FLOPs; out of the cache come 8 rows rank bytes of hidden and d_hidden for each tile. To add up in the kernel before,
    block of rows after block, would write and read 16 rank dim bytes for each: at rank 64 five times features and grad.
    """
    tile = tl.program_id(0)
    d_blocks = tl.cdiv(dim, BLOCK_DIM)
    r_blocks = tl.maximum(1, tl.cdiv(rank, BLOCK_RANK))  # of rank 0 too there is a tile, for the bias
    d = tile % d_blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    r = tile // d_blocks % r_blocks * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    task = tile // (d_blocks * r_blocks)
    part = tl.program_id(1)
    begin, end = places_of_task(bounds, task, samples, True)
    rows = (end - begin) * tokens
    blocks = tl.cdiv(rows, BLOCK)
    first = (blocks * part // parts) * BLOCK
    last = tl.minimum((blocks * (part + 1) // parts) * BLOCK, rows)

    share = tl.full((1, 1), 1, ACCUMULATE) / tokens
    of_down = tl.zeros((BLOCK_RANK, BLOCK_DIM), dtype=ACCUMULATE)
    of_up = tl.zeros((BLOCK_RANK, BLOCK_DIM), dtype=ACCUMULATE)
    of_bias = tl.zeros((BLOCK_DIM,), dtype=ACCUMULATE)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        there = row < last
        sample, token = row_of_task(order, begin, row, tokens, there)
        mask = there[:, None] & (d[None, :] < dim)
        of_hidden = (sample.to(tl.int64) * tokens + token) * rank
        hidden_mask = there[:, None] & (r[None, :] < rank)
        change = tl.load(d_hidden + of_hidden[:, None] + r[None, :], mask=hidden_mask, other=0.0)
        x = features + row_offset(sample, token, samples, features_strides)
        x = tl.load(x[:, None] + d[None, :], mask=mask, other=0.0)
        change = tl.trans(change).to(OPERAND)
        of_down = tl.dot(change, x.to(OPERAND), of_down, input_precision=PRECISION, out_dtype=ACCUMULATE)
        activation = tl.load(hidden + of_hidden[:, None] + r[None, :], mask=hidden_mask, other=0.0)
        grad_rows = row_offset(sample, token, samples, grad_strides)
        mean_rows = sample.to(tl.int64)[:, None] * dim
        gradient = _load_gradient(grad, grad_means, grad_rows, mean_rows, d, mask, mask, share, ACCUMULATE)
        if d_bias is not None:
            of_bias += tl.sum(gradient, axis=0)
        activation = tl.trans(activation).to(OPERAND)
        of_up = tl.dot(activation, gradient.to(OPERAND), of_up, input_precision=PRECISION, out_dtype=ACCUMULATE)

    adapter = (part.to(tl.int64) * num_tasks + task) * rank * dim
    mask = (r[:, None] < rank) & (d[None, :] < dim)
    tl.store(d_down + adapter + r[:, None] * dim + d[None, :], of_down, mask=mask)
    tl.store(d_up + adapter + d[:, None] * rank + r[None, :], -tl.trans(of_up), mask=tl.trans(mask))
    if d_bias is not None and tile // d_blocks % r_blocks == 0:
        tl.store(d_bias + (part.to(tl.int64) * num_tasks + task) * dim + d, -of_bias, mask=d < dim)
