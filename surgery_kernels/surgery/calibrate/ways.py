"""The batches of one task on their way through the blocks of both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ...modules.inputs import batch_size
from ...modules.runner import BlockRunner, Started


class Streams(Protocol):
    """A tensor for each batch; what is set in its place is read behind the block only."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int) -> Tensor: ...

    def __setitem__(self, batch: int, stream: Tensor) -> None: ...


def _nothing(_: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Side:
    """What one of the models makes of them."""

    model: nn.Module
    runner: BlockRunner
    begun: Sequence[Started]
    streams: Streams
    holding: Callable[[int], AbstractContextManager[None]] = _nothing  # has the weights of a block, while it lasts

    def run(self, block: int, batch: int, stream: Tensor) -> Tensor:
        return self.runner.run(self.begun[batch], block, stream)

    def finish(self, batch: int, stream: Tensor) -> Tensor:
        return self.runner.finish(self.begun[batch], stream)


@dataclass
class Way:
    task: str
    student: Side
    expert: Side

    def __len__(self) -> int:
        return len(self.student.streams)

    def size(self, batch: int) -> int:
        return batch_size(self.student.begun[batch].inputs)
