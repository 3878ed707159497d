"""What the rows of a layer's call count."""

from __future__ import annotations

from torch import Tensor

from ...modules.runner import BlockRunner, Started, read_weights, row_weights
from ...modules.visits import Visit


class RowWeights:
    """Padding counts nothing, and rows that are not read `unread`."""

    def __init__(self, mask: Tensor | None, unread: float = 1.0) -> None:
        """`mask`: of the stream's rows, in its layout; None: all of them are real."""
        self._shape = None if mask is None else mask.shape
        self._turned_shape = None if mask is None else mask.T.shape
        # one tensor for all layers that see all of it, by which they are known to have the same products
        self._flat = None if mask is None else mask.flatten()
        self._turned = None if mask is None else mask.T.flatten()
        self._unread = unread

    @classmethod
    def of_batch(cls, runner: BlockRunner, begun: Started, stream: Tensor, unread: float = 1.0) -> RowWeights:
        mask = row_weights(begun.inputs, runner.batch_first(stream))
        return cls(None if mask is None or mask.all() else runner.batch_first(mask).double(), unread)

    def of(self, visit: Visit, read: Tensor | None = None) -> Tensor | None:
        """`read`: which rows are; None: all.  # float64 [rows]; None: 1 each"""
        weights = None if read is None else read_weights(read, self._unread).flatten()
        shape = visit.inputs.shape[:-1]
        if self._flat is None or shape.numel() != self._flat.numel():  # pooled rows have no padding
            return weights
        is_turned = shape == self._turned_shape and shape != self._shape  # attention may have another layout
        mask = self._turned if is_turned else self._flat
        assert mask is not None
        return mask if weights is None else weights * mask
