"""Training of the final representation's adapters (Surgery): one call for many steps, on cached features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import surgery_train
from ..adapters import SurgeryAdapters
from ..batches import TaskData
from .train import Adam


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
