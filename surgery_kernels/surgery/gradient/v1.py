"""Training of the final representation's adapters (Surgery): one call for many steps, on cached features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import representation_loss, surgery_adapter, surgery_train
from ..adapters import SurgeryAdapters
from ..batches import TaskData
from .train import Adam, Steps


class FinalTrainer:
    """V1: both models' final representations are constants, so no model takes part."""

    stride = 100

    def __init__(
        self,
        adapters: SurgeryAdapters,
        data: Sequence[TaskData],
        features: Sequence[Tensor],  # [num_used, dim] per task
        targets: Sequence[Tensor],
        adam: Adam,
    ) -> None:
        self._down = adapters.down[0].detach()
        self._up = adapters.up[0].detach()
        self._down_moments = self._down.new_zeros(2, *self._down.shape)
        self._up_moments = self._up.new_zeros(2, *self._up.shape)
        device = self._down.device
        self._features = [x.to(device) for x in features]
        self._targets = [x.to(device) for x in targets]
        rows = torch.stack([of_task.rows for of_task in data], dim=1)
        self._rows = rows.to(device)  # [steps, num_tasks, batch_size]
        self._adam = adam

    def train(self, start: int, stop: int) -> Tensor:
        losses = surgery_train(
            self._features,
            self._targets,
            self._down,
            self._up,
            self._down_moments,
            self._up_moments,
            self._rows[start:stop].contiguous(),
            step=start * (1 + self._adam.zero_grad_steps),
            lr=self._adam.lr,
            zero_grad_steps=self._adam.zero_grad_steps,
        )
        return losses.unsqueeze(-1)

    def state(self) -> dict[str, Any]:
        return {"down_moments": self._down_moments, "up_moments": self._up_moments}

    def load(self, state: dict[str, Any]) -> None:
        self._down_moments.copy_(state["down_moments"])
        self._up_moments.copy_(state["up_moments"])


class LinearFinalTrainer:
    """V1 of linear adapters, which start from a closed form: the same steps by torch, one after another."""

    stride = 100

    def __init__(
        self,
        adapters: SurgeryAdapters,
        data: Sequence[TaskData],
        features: Sequence[Tensor],  # [num_used, dim] per task
        targets: Sequence[Tensor],
        adam: Adam,
    ) -> None:
        self._adapters = adapters
        device = adapters.down[0].device
        self._pairs = [[x.to(device) for x in pair] for pair in zip(features, targets, strict=True)]
        self._rows = [of_task.rows.to(device) for of_task in data]  # [steps, batch_size] each
        self._steps = Steps(adapters, adam)

    @torch.enable_grad()
    def train(self, start: int, stop: int) -> Tensor:
        losses = []
        for step in range(start, stop):
            x, targets = (torch.stack(list(batches)) for batches in zip(*self._batches(step), strict=True))
            down, up, options = self._adapters.factors(0)
            corrected = surgery_adapter(x, down, up, **options)
            losses.append(representation_loss(corrected, targets))  # [num_tasks]
            self._steps.take(losses[-1].sum())
        return torch.stack(losses).detach().unsqueeze(-1)

    def _batches(self, step: int) -> list[list[Tensor]]:
        return [[x[rows[step]] for x in pair] for pair, rows in zip(self._pairs, self._rows, strict=True)]

    def state(self) -> dict[str, Any]:
        return self._steps.state()

    def load(self, state: dict[str, Any]) -> None:
        self._steps.load(state)
