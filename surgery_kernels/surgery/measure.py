"""How far models are from the experts, for samples that the fit has or has not seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..modules.pools import Pool
from .adapters import SurgeryAdapters
from .attach import attach
from .bias import collect_features
from .features import check_finite
from .run import Run


class Measure:
    """mean |features - features of the expert| of every task and site; each expert runs once, when it is seen."""

    def __init__(self, argument: str, run: Run, samples: Mapping[str, Pool]) -> None:
        self._argument, self._run, self._samples = argument, run, samples
        self._targets: dict[str, list[Tensor]] = {}  # of every site

    def see(self, task: str, expert: nn.Module) -> None:
        features = self._features(expert, task)
        for site, of_site in zip(self._run.sites.names, features, strict=True):
            check_finite(f"features of experts[{task!r}] at site {site!r} for {self._argument}[{task!r}]", of_site)
        self._targets[task] = features

    def of_merged(self) -> Tensor:
        """[num_tasks, num_sites]"""
        return torch.tensor([self._distances(task, self._run.merged) for task in self._run.tasks])

    def of(self, adapters: SurgeryAdapters) -> Tensor:
        """Of the merged model with adapters attached.  # [num_tasks, num_sites]"""
        with attach(self._run.merged, adapters, self._run.sites) as surgery:
            return torch.tensor([self._distances(task, surgery, task) for task in self._run.tasks])

    def _distances(self, of_task: str, model: nn.Module, task: str | None = None) -> list[float]:
        pairs = zip(self._features(model, of_task, task), self._targets[of_task], strict=True)
        return [float((x - target).abs().mean(dim=1).mean(dtype=torch.float64)) for x, target in pairs]

    def _features(self, model: nn.Module, of_task: str, task: str | None = None) -> list[Tensor]:
        run = self._run
        features = collect_features(model, self._samples[of_task], run.sites, task, batch_size=run.batch_size)
        return list(features.values())
