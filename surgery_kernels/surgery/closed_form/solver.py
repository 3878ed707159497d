"""Adapters without gradients: at every site, block after block, the linear map that brings the merged model's tokens to
the expert's as well as one of its rank can."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...merging.progress import counting_bar
from ...modules.device import device_of
from ..adapters import SurgeryAdapters
from ..features import Recorder
from ..measure import Measure
from ..run import Run
from ..storage.store import FeatureStore
from .options import ClosedForm
from .walk import Targets, Walk

MEMORY = 2**31  # bytes of the experts' features that are held at a time


def solve_closed_form(how: ClosedForm, run: Run, measure: Measure | None = None) -> tuple[SurgeryAdapters, Tensor]:
    """Adapters of all tasks, and the bias before and after each site's own.  # [2, num_tasks, num_sites]

    Each expert runs once over the samples, one after the other; the tasks of as many as fit into memory together then
    go through the blocks side by side. `measure` sees the experts while they are there.
    """
    with Recorder(run.merged, run.sites, run.autocast, token_mean=False) as record:
        probe = record(next(next(iter(run.pools.values())).stream([torch.zeros(1, dtype=torch.int64)])))
    store = FeatureStore.like(probe, run.sites, run.cache, run.batch_size, run.autocast)
    widths = dict(zip(run.sites.names, store.widths, strict=True))
    adapters = SurgeryAdapters(
        len(run.pools), widths, run.rank, tasks=run.tasks, dtype=probe[-1].dtype, kind="linear", seed=0
    ).to(device_of(run.merged))
    with counting_bar(2 * sum(map(len, run.pools.values())), "surgery", "sample", run.progress) as bar:
        walk, features = Walk(how, run, adapters, bar), Targets(run, store, bar)
        walk.resume()
        for tasks in _groups(run, store):
            targets = {}
            for task in tasks:
                if walk.is_done(task) and measure is None:
                    continue
                expert = run.expert(task)
                if measure is not None:
                    measure.see(task, expert)
                if not walk.is_done(task):
                    targets[task] = features.of(expert, task)
            if targets:
                walk.go(targets, features)
    return adapters, walk.bias


def _groups(run: Run, store: FeatureStore) -> Iterator[list[str]]:
    """Tasks, in order, whose experts' features are kept at the same time: on disk all."""
    group: list[str] = []
    held = 0
    for task, pool in run.pools.items():
        size = 0 if store.folder is not None else len(pool) * store.bytes_per_sample
        if group and held + size > MEMORY:
            yield group
            group, held = [], 0
        group.append(task)
        held += size
    yield group
