"""The loop over steps, with bars and checkpoints; `v1` and `v2` say what a step is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...merging.progress import counting_bar
from ..adapters import SurgeryAdapters
from ..features import check_finite
from ..storage.resume import Checkpoint


@dataclass(frozen=True)
class Adam:
    """Adam with the usual betas; `zero_grad_steps` more steps with gradient zero follow each step."""

    lr: float
    zero_grad_steps: int


class Steps:
    """torch's Adam on all adapters."""

    def __init__(self, adapters: SurgeryAdapters, adam: Adam) -> None:
        # of full rank `up` is nothing
        moved = [parameter for parameter in adapters.parameters() if parameter.numel()]
        self._optimizer = torch.optim.Adam(moved, lr=adam.lr, fused=True)
        self._zero_grad_steps = adam.zero_grad_steps

    def take(self, loss: Tensor) -> None:
        loss.backward()
        self._optimizer.step()
        for _ in range(self._zero_grad_steps):
            self._optimizer.zero_grad(set_to_none=False)
            self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])


class Trainer(Protocol):
    """Trains adapters step after step, always the same steps whatever it is interrupted by."""

    stride: int  # steps worth doing in one call of `train`

    def train(self, start: int, stop: int) -> Tensor:
        """Takes the steps in [start, stop); gives their bias.  # [stop - start, num_tasks, num_sites]"""

    def state(self) -> dict[str, Any]:
        """Everything `load` needs to go on from here, besides the adapters."""

    def load(self, state: dict[str, Any]) -> None: ...


def train(
    trainer: Trainer,
    adapters: SurgeryAdapters,
    steps: int,
    checkpoint: Checkpoint | None,
    resume: bool,
    progress: bool | None,
) -> Tensor:
    """All steps, or those the checkpoint leaves; gives the bias of all.  # [steps, num_tasks, num_sites]"""
    bias = torch.zeros(steps, adapters.num_tasks, len(adapters.sites))
    start = 0
    if checkpoint is not None and resume and (state := checkpoint.load()) is not None:
        start = state["step"]
        if start > steps:
            raise ValueError(f"steps must be {start} or greater, as in checkpoint, got {steps}")
        bias[:start] = state["bias"]
        adapters.load_state_dict(state["adapters"])
        trainer.load(state["trainer"])
    with counting_bar(steps, "surgery", "step", progress) as bar:
        bar.update(start)
        while start < steps:
            stop = min(start + trainer.stride, steps)
            if checkpoint is not None:
                stop = min(stop, start + checkpoint.every - start % checkpoint.every)
            bias[start:stop] = trainer.train(start, stop)
            _check_finite(bias[start:stop], adapters)
            bar.set_postfix(loss=f"{bias[stop - 1].sum(-1).mean():.4f}", refresh=False)
            bar.update(stop - start)
            start = stop
            if checkpoint is not None and (start % checkpoint.every == 0 or start == steps):
                checkpoint.save(
                    {
                        "step": start,
                        "bias": bias[:start].clone(),
                        "adapters": adapters.state_dict(),
                        "trainer": trainer.state(),
                    }
                )
    return bias


def _check_finite(bias: Tensor, adapters: SurgeryAdapters) -> None:
    if torch.isfinite(bias).all():
        return
    for task, of_task in zip(adapters.tasks, bias.unbind(1), strict=True):
        for site, of_site in zip(adapters.sites, of_task.unbind(1), strict=True):
            check_finite(f"features of task {task!r} at site {site!r}", of_site)
