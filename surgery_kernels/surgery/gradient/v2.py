"""Training of all blocks' adapters (SurgeryV2): every step is a pass through the merged model and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...modules.device import autocast_to, device_of
from ...modules.hooks import SiteHooks
from ...modules.inputs import Inputs, concatenate, to_device
from ...modules.sites import Sites
from ...ops import representation_loss, surgery_adapter
from ..adapters import SurgeryAdapters
from ..batches import TaskData
from .early import Early, early_blocks
from .train import Adam, Steps


class DeepTrainer:
    """V2: every site corrects what the next block reads, so each step is a pass forward and back.

    All tasks go through the model as one batch, grouped by task. What the blocks up to the first site give is the same
    in every step: kept from the first one on, it stands in for them.
    """

    stride = 1

    def __init__(
        self,
        adapters: SurgeryAdapters,
        merged: nn.Module,
        sites: Sites,
        data: Sequence[TaskData],
        targets: Sequence[Tensor],  # [num_used, sum of widths] per task
        adam: Adam,
        *,
        detach_layers: bool,
        autocast: torch.dtype | None,
    ) -> None:
        self._adapters = adapters
        self._merged = merged
        self._sites = sites
        self._data = data
        self._targets = targets
        self._device = device_of(merged)
        self._steps = Steps(adapters, adam)
        self._detach_layers = detach_layers
        self._autocast = autocast
        self._batches: Iterator[tuple[Inputs, ...]] | None = None  # from the first step on
        self._early: Early | None = None
        self._targets_of_step: Sequence[Tensor] = ()  # per site [num_tasks, batch_size, dim]
        self._losses = [torch.empty(0)] * len(sites.names)  # [num_tasks] each

    def train(self, start: int, stop: int) -> Tensor:
        if self._batches is None:
            streams = [of_task.pool.stream(list(of_task.order[start:])) for of_task in self._data]
            self._batches = zip(*streams, strict=True)
            of_model = self._merged, self._sites, self._data
            self._early = early_blocks(*of_model, len(self._data) * self._data[0].rows.shape[1], self._autocast)
        stand_in = nullcontext() if self._early is None else self._early.standing_in()
        with SiteHooks(self._merged, self._sites, self._correct) as hooks, stand_in:
            return torch.stack([self._step(step, hooks, self._batches) for step in range(start, stop)])

    @torch.enable_grad()
    def _step(self, step: int, hooks: SiteHooks, batches: Iterator[tuple[Inputs, ...]]) -> Tensor:
        rows = [of_task.rows[step] for of_task in self._data]
        targets = torch.stack([x[of_step] for of_step, x in zip(rows, self._targets, strict=True)])
        self._targets_of_step = targets.to(self._device).split(list(self._adapters.widths.values()), dim=-1)
        if self._early is not None:
            self._early.choose(rows)
        with autocast_to(self._autocast, self._device):
            hooks.run(self._merged, to_device(concatenate(next(batches)), self._device))
        bias = torch.stack(self._losses, dim=-1)  # [num_tasks, num_sites]
        # A sum over sites and tasks: Adam then sees each adapter's gradient at the scale it has alone.
        self._steps.take(bias.sum())
        return bias.detach()

    def _correct(self, site: int, features: Tensor) -> Tensor:
        down, up, options = self._adapters.factors(site)
        grouped = features.unflatten(0, (len(down), -1))
        if site < len(self._sites.blocks):
            corrected, compared = surgery_adapter(grouped, down, up, token_mean=True, **options)
        else:
            corrected = compared = surgery_adapter(grouped, down, up, **options)
        targets = self._targets_of_step[site]
        self._losses[site] = representation_loss(compared.to(targets.dtype), targets)
        return (corrected.detach() if self._detach_layers else corrected).flatten(0, 1)

    def state(self) -> dict[str, Any]:
        return self._steps.state()

    def load(self, state: dict[str, Any]) -> None:
        self._steps.load(state)
