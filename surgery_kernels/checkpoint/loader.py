"""The tensors of a step as the ops take them: one shape, one dtype, one device."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import Buffers, Scratch
from .steps import Input, Step
from .vocabulary.rows import Rows

ROWS_AT_ONCE = 4096  # copied by index, which takes memory


class Loader:
    """Views of memory maps where the tensors lie in files as they are wanted, copies in `scratch` where not."""

    def __init__(self, scratch: Scratch, device: torch.device | str = "cpu") -> None:
        self._scratch = scratch
        self._buffers = Buffers()
        self._device = torch.device(device)

    def load(self, wanted: Input, step: Step) -> Tensor:
        tensor = wanted.source.tensor(wanted.name)
        if not step.takes_as_it_is(wanted):
            tensor = self._fitted(tensor, wanted.rows, step)
        return tensor.to(self._device)

    def empty(self, step: Step) -> Tensor:
        """Memory for the merged tensor."""
        if self._device.type != "cpu":
            return torch.empty(step.shape, dtype=step.dtype, device=self._device)
        memory = self._buffers if step.dtype == step.out_dtype else self._scratch
        return memory.empty(step.shape, step.dtype)

    def _fitted(self, tensor: Tensor, rows: Rows | None, step: Step) -> Tensor:
        fitted = self._scratch.empty(step.shape, step.dtype)
        if tensor.shape == fitted.shape and rows is None:
            return fitted.copy_(tensor)
        num_rows = min(len(tensor), len(fitted))
        if rows is not None or num_rows < len(fitted):
            first = step.first.source.tensor(step.first.name)
            fitted.copy_(first[: len(fitted)])
        if rows is None:
            fitted[:num_rows].copy_(tensor[:num_rows])
        else:
            for here, there in zip(rows.here.split(ROWS_AT_ONCE), rows.there.split(ROWS_AT_ONCE), strict=True):
                fitted[here] = tensor[there].to(fitted.dtype)
        return fitted
