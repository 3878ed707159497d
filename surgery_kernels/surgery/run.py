"""What one call of `fit` is about, whatever solves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modules.pools import Pool
from ..modules.sites import Sites
from .adapters import Rank
from .experts import Expert, load_expert
from .storage.cache import fingerprint
from .storage.resume import Checkpoint


@dataclass(frozen=True)
class Run:
    """Models, samples, and where what they give is kept."""

    merged: nn.Module
    experts: Mapping[str, Expert]
    pools: Mapping[str, Pool]
    sites: Sites
    mode: str
    rank: Rank
    batch_size: int
    cache: str | PathLike[str]
    checkpoint: Path | None
    resume: bool
    autocast: torch.dtype | None
    progress: bool | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.pools)

    @property
    def folder(self) -> Path | None:
        """For what is not kept in memory."""
        return None if self.cache == "memory" else Path(self.cache)

    @property
    def is_identified(self) -> bool:
        """Whether models must be told from others: by what lies on disk."""
        return self.cache != "memory" or self.checkpoint is not None

    def expert(self, task: str) -> nn.Module:
        return load_expert(task, self.experts[task], self.merged, self.sites)

    def identity(self, model: nn.Module) -> str:
        return fingerprint([model.state_dict()]) if self.is_identified else ""

    def identities(self) -> Iterator[tuple[str, str]]:
        """Of the experts, one after the other."""
        for task in self.tasks:
            yield f"experts[{task!r}]", self.identity(self.expert(task))

    def interrupted(self, every: int, suffix: str = "", **options: Any) -> Checkpoint | None:
        """Where the state of this call is kept, if anywhere; `options` are those of the solver."""
        if self.checkpoint is None:
            return None
        configuration = {
            "mode": self.mode,
            "sites": list(self.sites.names),
            "rank": self.rank,
            "batch_size": self.batch_size,
            "autocast": str(self.autocast),
            "tasks": list(self.tasks),
            "samples": {task: len(pool) for task, pool in self.pools.items()},
            **options,
        }
        path = self.checkpoint.with_name(self.checkpoint.name + suffix)
        return Checkpoint(path, configuration, every)
