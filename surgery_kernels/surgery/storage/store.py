"""Features of a model for the samples that training will use, kept in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...modules.inputs import batch_size
from ...modules.sites import Sites
from ..batches import TaskData
from ..features import Recorder, check_finite
from .cache import cached, fingerprint

NUM_PROBES = 16  # samples whose contents tell a cache of other data


@dataclass(frozen=True)
class FeatureStore:
    """How and where features are computed and kept."""

    sites: Sites
    shapes: tuple[tuple[int, ...], ...]  # of one sample: [dim], or at blocks [tokens, dim]
    dtype: torch.dtype
    folder: Path | None
    batch_size: int
    autocast: torch.dtype | None

    @classmethod
    def like(
        cls,
        probe: Sequence[Tensor],
        sites: Sites,
        cache: str | PathLike[str],
        batch_size: int,
        autocast: torch.dtype | None,
    ) -> FeatureStore:
        """For features like those of one sample."""
        folder = None if cache == "memory" else Path(cache)
        return cls(sites, tuple(tuple(x.shape[1:]) for x in probe), probe[-1].dtype, folder, batch_size, autocast)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(shape[-1] for shape in self.shapes)

    @property
    def bytes_per_sample(self) -> int:
        return sum(map(math.prod, self.shapes)) * self.dtype.itemsize

    @property
    def has_tokens(self) -> bool:
        return any(len(shape) > 1 for shape in self.shapes)

    def by_batch(self, rows: Tensor) -> list[list[Tensor]]:
        """What `features` gives, as views: of every batch those of all sites."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return [
            [x.unflatten(1, shape) for x, shape in zip(of_batch.split(sizes, dim=1), self.shapes, strict=True)]
            for of_batch in rows.split(self.batch_size)
        ]

    def features(self, what: str, model: nn.Module, identity: str, data: TaskData, bar: tqdm) -> Tensor:
        """A row per used sample: the features of all sites, side by side.  # [num_used, sum of sizes]

        In a folder, `identity` tells those of this model from those of others.
        """

        def fill(rows: Tensor) -> None:
            batches = data.used.split(self.batch_size)
            with Recorder(model, self.sites, self.autocast, token_mean=not self.has_tokens) as record:
                for into, inputs in zip(rows.split(self.batch_size), data.pool.stream(batches), strict=True):
                    features = record(inputs)
                    self._check(what, data.task, features)
                    torch.cat([x.flatten(1) for x in features], dim=1, out=into)
                    bar.update(batch_size(inputs))

        shape = (len(data.used), sum(map(math.prod, self.shapes)))
        key = "" if self.folder is None else self._key(identity, data)
        name = f"{what} of {data.task}{', by token' if self.has_tokens else ''}"
        return cached(self.folder, name, shape, self.dtype, key, fill)

    def _check(self, what: str, task: str, features: list[Tensor]) -> None:
        for site, shape, of_site in zip(self.sites.names, self.shapes, features, strict=True):
            name = f"{what} of task {task!r} at site {site!r}"
            for dim, of_shape in ((-1, "width"), (0, "number of tokens")):
                got = of_site.shape[1:][dim]
                if got != shape[dim]:
                    raise ValueError(f"{name} must have the {of_shape} of the merged model, {shape[dim]}, got {got}")
            check_finite(name, of_site)

    def _key(self, identity: str, data: TaskData) -> str:
        spread = torch.linspace(0, len(data.used) - 1, min(NUM_PROBES, len(data.used))).long()
        probes = next(data.pool.stream([data.used[spread]]))
        return fingerprint([self.sites, self.autocast, data.used, probes, identity])
