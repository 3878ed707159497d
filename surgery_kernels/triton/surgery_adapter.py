"""surgery_adapter and its gradients in Triton: one launch forward, two backward.

With a task_index and rows without tokens one launch before sorts the rows by task. Means of many tokens, and sums over
the rows of few tasks, are cut into parts that depend on the shapes alone and added up in their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapter_kernels import (
    ADAPTER_TILES,
    ROWS_TILES,
    Products,
    Tile,
    backward_adapter_kernel,
    backward_rows_kernel,
    forward_kernel,
    products_of,
)
from .adapter_rows import RowLayout, SampleOrder

LEAST = 16  # rows and ranks that tl.dot takes
MOST_RANKS = 128  # kept in registers; more go through memory, by so many at once:
RANKS_THROUGH_MEMORY = 64
# That keep a GPU busy, four for each of 132 multiprocessors: sums over rows are cut while that gives fewer. A part of
# 8 adapters of rank 16 and dim 768 takes 0.8 MB, written and read once, mostly in the cache.
PROGRAMS = 528


class Operands:
    """The checked operands of both directions, and which program takes which rows."""

    def __init__(
        self,
        features: Tensor,
        down: Tensor,
        up: Tensor,
        task_index: Tensor | None,
        activation: str,
        by_sample: bool,
    ) -> None:
        self.features, self.down, self.up = features, down.contiguous(), up.contiguous()
        self.layout = RowLayout.of(features, down.shape[0], task_index)
        self.num_tasks, self.rank, self.dim = down.shape
        self.relu = activation == "relu"
        self._check()
        self.compute = torch.promote_types(features.dtype, torch.float32)
        self.products = products_of(features, down)
        self.through_memory = self.rank > MOST_RANKS
        self.block_rank = RANKS_THROUGH_MEMORY if self.through_memory else max(LEAST, triton.next_power_of_2(self.rank))
        # Where a sample is one row, the rows of a task have to be brought together.
        self.by_sample = by_sample or (task_index is not None and self.layout.has_tokens)
        tile = self.tile_of(ROWS_TILES)
        rows = tile.rows // 2 if self.through_memory else tile.rows
        if self.by_sample:
            rows = min(rows, triton.next_power_of_2(self.layout.tokens))
        self.tile = tile._replace(rows=max(rows, LEAST))

    def _check(self) -> None:
        """What would corrupt memory; users meet the checks of the public op first."""
        layout, num_tasks, rank, dim = self.layout, self.num_tasks, self.rank, self.dim
        features, index = self.features, layout.task_index
        if not has_contiguous_rows(features):
            raise RuntimeError(f"features must be contiguous in the last dimension, got stride {features.stride(-1)}")
        if layout.dim != dim:
            raise RuntimeError(f"down must have the dim of features, {layout.dim}, got {dim}")
        if self.up.shape != (num_tasks, dim, rank):
            raise RuntimeError(f"up must have shape {(num_tasks, dim, rank)}, got {tuple(self.up.shape)}")
        if index is None and len(features) != num_tasks:
            raise RuntimeError(f"features must have the num_tasks of down, {num_tasks}, got {len(features)}")
        if index is not None and (index.shape != (layout.samples,) or index.dtype != torch.int64):
            raise RuntimeError(f"task_index must be int64 [{layout.samples}], got {index.dtype} {list(index.shape)}")

    def tile_of(self, tiles: dict[Products, dict[int, Tile]]) -> Tile:
        return tiles[self.products][self.block_rank]

    @property
    def blocks(self) -> int:
        """Of each sample, or else of each task: of all together where their numbers are only known on the device."""
        rows = self.layout.tokens if self.by_sample else self.layout.samples * self.layout.tokens
        return triton.cdiv(rows, self.tile.rows)

    @property
    def grid(self) -> tuple[int]:
        """Of the kernels that go by rows."""
        if self.by_sample:
            return (self.layout.all_samples * self.blocks,)
        if self.layout.task_index is None:
            return (self.num_tasks * self.blocks,)
        return (self.blocks + self.num_tasks + 1,)  # every task, and none, may end in a block that is not full

    def by_rows(self, order: SampleOrder | None) -> dict[str, Any]:
        """What the kernels that go by rows take last."""
        return {
            "task_index": self.layout.task_index,
            **self._sizes(order),
            "blocks": self.blocks,
            "BY_SAMPLE": self.by_sample,
            "TASKS": triton.next_power_of_2(self.num_tasks + 1),
            "THROUGH_MEMORY": self.through_memory,
            "RELU": self.relu,
            **self._options(self.tile),
        }

    def by_tiles(self, order: SampleOrder | None, tile: Tile, parts: int) -> dict[str, Any]:
        """What the kernel that goes by tiles of the adapter takes last."""
        return {**self._sizes(order), "parts": parts, **self._options(tile)}

    def _sizes(self, order: SampleOrder | None) -> dict[str, Any]:
        return {
            "order": None if order is None else order.order,
            "bounds": None if order is None else order.bounds,
            "num_tasks": self.num_tasks,
            "samples": self.layout.samples,
            "tokens": self.layout.tokens,
            "dim": self.dim,
            "rank": self.rank,
        }

    def _options(self, tile: Tile) -> dict[str, Any]:
        return {
            "BLOCK": tile.rows,
            "BLOCK_DIM": tile.dim,
            "BLOCK_RANK": self.block_rank,
            "OPERAND": self.products.operand,
            "ACCUMULATE": tl.float64 if self.compute == torch.float64 else tl.float32,
            "PRECISION": self.products.precision,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": True,
        }

    def empty(self, *sizes: int) -> Tensor:
        return self.features.new_empty(sizes, dtype=self.compute)


def has_contiguous_rows(t: Tensor) -> bool:
    return t.shape[-1] < 2 or t.stride(-1) == 1


def empty_like_rows(features: Tensor) -> Tensor:
    """In the layout of `features`, unless their rows overlap: then torch may put another dimension last."""
    like = torch.empty_like(features)
    return like if has_contiguous_rows(like) else features.new_empty(features.shape)


def surgery_adapter(
    features: Tensor,
    down: Tensor,
    up: Tensor,
    task_index: Tensor | None = None,
    token_mean: bool = False,
    keep_hidden: bool = False,
    bias: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Corrected features, their means over tokens and the hidden values; empty tensors for what is not wanted.

    Rows of a sample whose task_index is outside [0, num_tasks) become NaN: to refuse them would wait for the device.
    """
    operands = Operands(features, down, up, task_index, activation, by_sample=token_mean)
    if bias is not None:
        _check_shape("bias", bias, (operands.num_tasks, operands.dim))
        bias = bias.contiguous()
    layout, nothing = operands.layout, operands.empty(0)
    corrected = empty_like_rows(features)
    needs_hidden = keep_hidden or operands.through_memory
    hidden = operands.empty(layout.rows, operands.rank) if needs_hidden else None
    parts = operands.empty(layout.all_samples, operands.blocks, operands.dim) if token_mean else None
    if layout.rows > 0:
        forward_kernel[operands.grid](
            features=features,
            down=operands.down,
            up=operands.up,
            bias=bias,
            corrected=corrected,
            means=parts,
            hidden=hidden,
            features_strides=layout.strides(features),
            corrected_strides=layout.strides(corrected),
            **operands.by_rows(None if operands.by_sample else SampleOrder.of(layout)),
        )
    means = nothing
    if parts is not None:
        shape = (*features.shape[:-2], operands.dim)
        means = parts.view(shape) if operands.blocks == 1 else parts.sum(dim=1).view(shape)
        if layout.tokens == 0:
            means.fill_(torch.nan)
    return corrected, means, hidden if keep_hidden and hidden is not None else nothing


def surgery_adapter_backward(
    grad: Tensor | None,
    grad_means: Tensor | None,
    features: Tensor,
    down: Tensor,
    up: Tensor,
    task_index: Tensor | None,
    hidden: Tensor,
    need_features: bool,
    need_adapter: bool,
    need_bias: bool = False,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of features, down, up and bias; empty where not needed."""
    operands = Operands(features, down, up, task_index, activation, by_sample=grad_means is not None)
    layout = operands.layout
    if grad is not None:
        _check_shape("grad", grad, features.shape)
        grad = grad if has_contiguous_rows(grad) else grad.contiguous()
    if grad_means is not None:
        _check_shape("grad_means", grad_means, (*features.shape[:-2], operands.dim))
        grad_means = grad_means.contiguous()
    _check_shape("hidden", hidden, (layout.rows, operands.rank))
    hidden = hidden.contiguous()
    need_sums = need_adapter or need_bias
    order = SampleOrder.of(layout) if need_sums or not operands.by_sample else None
    needs_d_hidden = need_sums or operands.through_memory
    d_hidden = operands.empty(layout.rows, operands.rank) if needs_d_hidden else None
    d_features = empty_like_rows(features) if need_features else None
    grad_strides = (0, 0, 0) if grad is None else layout.strides(grad)
    if layout.rows > 0:
        backward_rows_kernel[operands.grid](
            grad=grad,
            grad_means=grad_means,
            down=operands.down,
            up=operands.up,
            hidden=hidden,
            d_hidden=d_hidden,
            d_features=d_features,
            grad_strides=grad_strides,
            d_features_strides=(0, 0, 0) if d_features is None else layout.strides(d_features),
            **operands.by_rows(order),
        )
    if d_features is None:
        d_features = features.new_empty(0)
    d_bias = operands.empty(operands.num_tasks, operands.dim) if need_bias else operands.empty(0)
    if d_hidden is None or not need_sums:
        return d_features, down.new_empty(0), up.new_empty(0), d_bias

    d_down, d_up = torch.empty_like(operands.down), torch.empty_like(operands.up)
    if d_bias.numel() == 0 and d_down.numel() == 0:
        return d_features, d_down, d_up, d_bias
    tile = operands.tile_of(ADAPTER_TILES)
    # Of rank 0 too there is a tile, for the bias.
    of_ranks = max(1, triton.cdiv(operands.rank, operands.block_rank))
    tiles = operands.num_tasks * triton.cdiv(operands.dim, tile.dim) * of_ranks
    blocks = triton.cdiv(layout.rows, operands.num_tasks * tile.rows)  # of an average task
    parts = max(1, min(blocks, PROGRAMS // tiles))
    of_down, of_up, of_bias = d_down, d_up, d_bias
    if parts > 1:
        of_down, of_up, of_bias = (operands.empty(parts, *x.shape) for x in (d_down, d_up, d_bias))
    backward_adapter_kernel[tiles, parts](
        grad=grad,
        grad_means=grad_means,
        features=features,
        hidden=hidden,
        d_hidden=d_hidden,
        d_down=of_down,
        d_up=of_up,
        d_bias=of_bias if need_bias else None,
        grad_strides=grad_strides,
        features_strides=layout.strides(features),
        **operands.by_tiles(order, tile, parts),
    )
    if parts > 1:
        torch.sum(of_down, dim=0, dtype=d_down.dtype, out=d_down)
        torch.sum(of_up, dim=0, dtype=d_up.dtype, out=d_up)
        if need_bias:
            torch.sum(of_bias, dim=0, out=d_bias)
    if not need_adapter:
        d_down, d_up = down.new_empty(0), up.new_empty(0)
    return d_features, d_down, d_up, d_bias


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise RuntimeError(f"{name} must have shape {tuple(shape)}, as surgery_adapter's results, got {tuple(t.shape)}")
