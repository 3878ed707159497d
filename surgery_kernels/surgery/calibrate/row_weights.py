"""What the rows of a layer's call count."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from ...modules.runner import BlockRunner, Started, read_weights, row_weights
from ...modules.visits import Visit


class RowWeights:
    """Padding counts nothing, and rows that are not read `unread`."""

    def __init__(self, mask: Tensor | None, unread: float = 1.0) -> None:
        """`mask`: of the stream's rows, in its layout; None: all of them are real."""
        self._mask, self._unread = mask, unread
        # one tensor for all layers that see all of it, by which they are known to have the same products
        self._flat: dict[tuple[torch.Size, tuple[int, ...]], Tensor] = {}

    @classmethod
    def of_batch(cls, runner: BlockRunner, begun: Started, stream: Tensor, unread: float = 1.0) -> RowWeights:
        mask = row_weights(begun.inputs, runner.batch_first(stream))
        return cls(None if mask is None or mask.all() else runner.batch_first(mask).double(), unread)

    def of(self, visit: Visit, read: Tensor | None = None) -> Tensor | None:
        """`read`: which rows are; None: all.  # float64 [rows]; None: 1 each"""
        weights = None if read is None else read_weights(read, self._unread).flatten()
        mask = self._mask_of(visit.inputs)
        return weights if mask is None else mask if weights is None else weights * mask

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """Of [..., dim] rows, among them perhaps a row per head; None for pooled ones, which have no padding."""
        if self._mask is None:
            return None
        shape = x.shape[:-1]
        axes = self._axes(shape, x.stride())
        if not axes and shape.numel() != self._mask.numel():
            return None
        key = (shape, axes)
        if key not in self._flat:
            mask = self._mask
            if axes:
                mask = mask if axes[0] < axes[1] else mask.T
                mask = mask[tuple(slice(None) if axis in axes else None for axis in range(len(shape)))].expand(shape)
            self._flat[key] = mask.flatten()
        return self._flat[key]

    def _axes(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Where the two axes of the mask are: of several possible pairs the one in its order; then the one that lies
        outermost in memory, for heads are cut out of tokens."""
        assert self._mask is not None
        pairs = [
            pair
            for i, j in combinations(range(len(shape)), 2)
            for pair in ((i, j), (j, i))
            if (shape[pair[0]], shape[pair[1]]) == self._mask.shape
        ]
        return max(pairs, key=lambda pair: (pair[0] < pair[1], strides[pair[0]] + strides[pair[1]]), default=())
