"""Features of a model for the samples that training will use, kept in memory or on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import TaskData
from .cache import cached, fingerprint
from .features import Recorder, check_finite
from .inputs import batch_size
from .sites import Sites

NUM_PROBES = 16  # samples whose contents tell a cache of other data


@dataclass(frozen=True)
class FeatureStore:
    """How and where features are computed and kept."""

    sites: Sites
    widths: tuple[int, ...]
    dtype: torch.dtype
    folder: Path | None
    batch_size: int
    autocast: torch.dtype | None

    def features(self, what: str, model: nn.Module, identity: str, data: TaskData, bar: tqdm) -> Tensor:
        """A row per used sample: the features of all sites, side by side.  # [num_used, sum of widths]

        In a folder, `identity` tells those of this model from those of others.
        """

        def fill(rows: Tensor) -> None:
            batches = data.used.split(self.batch_size)
            with Recorder(model, self.sites, self.autocast) as record:
                for into, inputs in zip(rows.split(self.batch_size), data.pool.stream(batches), strict=True):
                    features = record(inputs)
                    self._check(what, data.task, features)
                    torch.cat(features, dim=1, out=into)
                    bar.update(batch_size(inputs))

        shape = (len(data.used), sum(self.widths))
        key = "" if self.folder is None else self._key(identity, data)
        return cached(self.folder, f"{what} of {data.task}", shape, self.dtype, key, fill)

    def _check(self, what: str, task: str, features: list[Tensor]) -> None:
        for site, width, of_site in zip(self.sites.names, self.widths, features, strict=True):
            name = f"{what} of task {task!r} at site {site!r}"
            if of_site.shape[1] != width:
                raise ValueError(f"{name} must have the width of the merged model, {width}, got {of_site.shape[1]}")
            check_finite(name, of_site)

    def _key(self, identity: str, data: TaskData) -> str:
        spread = torch.linspace(0, len(data.used) - 1, min(NUM_PROBES, len(data.used))).long()
        probes = next(data.pool.stream([data.used[spread]]))
        return fingerprint([self.sites, self.autocast, data.used, probes, identity])
