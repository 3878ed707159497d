"""The tensors of a step as the ops take them: one shape, one dtype, one device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..merging.low_rank import LowRank
from .memory import Buffers, Scratch
from .reading.lora import LoraExpert
from .steps import Input, Step


class Loader:
    """Views of memory maps where the tensors lie in files as they are wanted, copies in `scratch` where not."""

    def __init__(
        self, scratch: Scratch, device: torch.device | str = "cpu", seen: Callable[[Input, Tensor], None] | None = None
    ) -> None:
        """`seen`: told of every tensor as its model gives it."""
        self._scratch = scratch
        self._seen = seen
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
        if self._seen:
            self._seen(wanted, tensor)
        if tensor.shape != step.shape:
            tensor = tensor[: step.shape[0]]
        return tensor if step.takes_as_it_is(wanted) else self._scratch.empty(step.shape, step.dtype).copy_(tensor)


def factors_of(step: Step) -> list[LowRank] | None:
    """What every expert adds to the base of a step, where all are LoRAs of it and say it as a product."""
    found = []
    for expert in step.experts:
        if not isinstance(expert.source, LoraExpert) or not expert.source.is_over(step.first.source):
            return None
        if expert.rows is not None or expert.info.shape != step.shape or expert.name != step.first.name:
            return None
        factors = expert.source.factors(expert.name)
        if factors is None:
            return None
        found.append(factors)
    if (changed := [one for one in found if one.rank]) and any(one.transposed for one in changed):
        found = [one if one.rank else LowRank(one.down.mT, one.up.mT, transposed=True) for one in found]
    return found if len({one.transposed for one in found}) == 1 else None
