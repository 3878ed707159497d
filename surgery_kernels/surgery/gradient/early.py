"""The blocks before the first correction: what they give is the same in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...modules.device import autocast_to, device_of
from ...modules.inputs import Inputs, run, to_device
from ...modules.outputs import open_output
from ...modules.sites import Sites
from ...modules.stand_in import standing_in
from ..batches import TaskData
from ..features import Recorder

MEMORY = 2**31  # bytes that may be kept
TOLERANCE = 1e-4  # under autocast 100 times


@dataclass
class Early:
    """Tokens behind the first site's block for the samples in use, which stand in for it and for those before it."""

    blocks: list[nn.Module]
    put: Callable[[Tensor], Any]  # a stream as the block returns it
    token_major: bool
    streams: list[Tensor]  # per task [num_used, tokens, dim]
    _now: Any = field(default=None, init=False)

    def choose(self, rows: Sequence[Tensor]) -> None:
        """Samples of the pass that follows, task after task, by their place among those in use."""
        stream = torch.cat([of_task[of_step] for of_task, of_step in zip(self.streams, rows, strict=True)])
        self._now = self.put(stream.transpose(0, 1).contiguous() if self.token_major else stream)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        with standing_in(self.blocks, lambda _: self._now):
            yield


@torch.no_grad()
def early_blocks(
    merged: nn.Module, sites: Sites, data: Sequence[TaskData], batch_size: int, autocast: torch.dtype | None
) -> Early | None:
    """None where the block gives more than tokens, where they take too much memory, or where a pass in which they stand
    in comes to something else."""
    if sites.token_major is None:
        return None
    runner = _UpTo(merged, sites, autocast)
    first = data[0].first()
    output = runner.output(first)
    is_plain = isinstance(output, Tensor) or (isinstance(output, tuple) and len(output) == 1)
    if not is_plain:
        return None
    slot = open_output(output, sites.blocks[0])
    if sum(len(of_task.used) for of_task in data) * slot.tensor.nbytes > _memory(slot.tensor.device):
        return None
    streams = [
        torch.cat([runner.stream(inputs) for inputs in of_task.pool.stream(of_task.used.split(batch_size))])
        for of_task in data
    ]
    early = Early(_blocks_up_to(merged, sites.blocks[0]), slot.put, sites.token_major, streams)
    with Recorder(merged, sites, autocast) as record:
        expected = record(first)
        record(next(data[0].pool.stream([data[0].used[-1:]])))  # so that nothing of the first is left
        early.choose([torch.zeros(int(i == 0), dtype=torch.int64) for i in range(len(data))])
        with early.standing_in():
            found = record(first)
    tolerance = TOLERANCE * (1 if autocast is None else 100)
    same = [
        torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y.abs().nan_to_num().max()), equal_nan=True)
        for x, y in zip(found, expected, strict=True)
    ]
    return early if all(same) else None


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return min(MEMORY, free // 4)


def _blocks_up_to(model: nn.Module, name: str) -> list[nn.Module]:
    """That block, and those of its class before it in the same list: nothing else reads what they give."""
    parent, _, child = name.rpartition(".")
    siblings = model.get_submodule(parent)
    block = model.get_submodule(name)
    if not isinstance(siblings, (nn.ModuleList, nn.Sequential)):
        return [block]
    blocks = []
    for key, sibling in siblings.named_children():
        if type(sibling) is type(block):
            blocks.append(sibling)
        if key == child:
            break
    return blocks


class _Reached(Exception):
    """Ends a pass behind the first site."""


class _UpTo:
    """Passes that end behind the first site's block."""

    def __init__(self, model: nn.Module, sites: Sites, autocast: torch.dtype | None) -> None:
        self._model, self._sites, self._autocast = model, sites, autocast
        self._output: Any = None

    def output(self, inputs: Inputs) -> Any:
        handle = self._model.get_submodule(self._sites.blocks[0]).register_forward_hook(self._stop)
        device = device_of(self._model)
        try:
            with autocast_to(self._autocast, device):
                run(self._model, to_device(inputs, device))
        except _Reached:
            pass
        finally:
            handle.remove()
        return self._output

    def stream(self, inputs: Inputs) -> Tensor:
        """[batch, tokens, dim]"""
        stream = open_output(self.output(inputs), self._sites.blocks[0]).tensor
        return stream.transpose(0, 1) if self._sites.token_major else stream

    def _stop(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._output = output
        raise _Reached
