"""Which samples of a task each step uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..modules.inputs import Inputs
from ..modules.pools import Pool
from .seeds import generator


def sample_order(seed: int, task: str, num_samples: int, steps: int, batch_size: int) -> Tensor:
    """The samples of every step: shuffled once per epoch, as a function of seed and task.  # int64 [steps, batch_size]

    More steps continue the order; neither the other tasks nor where a run was interrupted matter.
    """
    epochs = -(-steps * batch_size // num_samples)
    shuffled = [torch.randperm(num_samples, generator=generator(seed, task, epoch)) for epoch in range(epochs)]
    return torch.cat(shuffled)[: steps * batch_size].view(steps, batch_size)


@dataclass(frozen=True)
class TaskData:
    """One task's samples, and which of them each step uses."""

    task: str
    pool: Pool
    order: Tensor  # int64 [steps, batch_size]: numbers of samples
    used: Tensor  # int64 [num_used]: those that occur, ascending
    rows: Tensor  # int64 [steps, batch_size]: `order` as positions in `used`

    def first(self) -> Inputs:
        """A batch of one sample."""
        return next(self.pool.stream([self.used[:1]]))


def task_data(task: str, pool: Pool, order: Tensor) -> TaskData:
    used, rows = order.unique(return_inverse=True)
    return TaskData(task, pool, order, used, rows)
