"""The tensors of a step as the ops take them: one shape, one dtype, one device."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import Buffers, Scratch
from .steps import Input, Step


class Loader:
    """Views of memory maps where the tensors lie in files as they are wanted, copies in `scratch` where not."""

    def __init__(self, scratch: Scratch, device: torch.device | str = "cpu") -> None:
        self._scratch = scratch
        self._buffers = Buffers()
        self._device = torch.device(device)

    def load(self, wanted: Input, step: Step) -> Tensor:
        return self._on_cpu(wanted, step).to(self._device)

    def empty(self, step: Step) -> Tensor:
        """Memory for the merged tensor."""
        if self._device.type != "cpu":
            return torch.empty(step.shape, dtype=step.dtype, device=self._device)
        memory = self._buffers if step.dtype == step.out_dtype else self._scratch
        return memory.empty(step.shape, step.dtype)

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy that may be written to."""
        if tensor.device.type != "cpu":
            return tensor.clone(memory_format=torch.contiguous_format)
        return self._scratch.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _on_cpu(self, wanted: Input, step: Step) -> Tensor:
        if wanted.rows is not None:
            return wanted.rows.fill(self._scratch.empty(step.shape, step.dtype))
        tensor = wanted.source.tensor(wanted.name)
        if tensor.shape != step.shape:
            tensor = tensor[: step.shape[0]]
        return tensor if step.takes_as_it_is(wanted) else self._scratch.empty(step.shape, step.dtype).copy_(tensor)
