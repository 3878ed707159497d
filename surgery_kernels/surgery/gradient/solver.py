"""Adapters by Adam: what is constant is computed once and kept, and the trainer of the mode takes the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...merging.progress import counting_bar
from ...modules.device import device_of
from ...modules.frozen import frozen
from ...modules.inputs import sample_shape
from ..adapters import SurgeryAdapters
from ..batches import TaskData, sample_order, task_data
from ..features import Recorder
from ..run import Run
from ..storage.store import FeatureStore
from .train import Adam, Trainer, train
from .v1 import FinalTrainer, LinearFinalTrainer
from .v2 import DeepTrainer


@dataclass(frozen=True)
class Gradient:
    """The steps of `fit`, by its options."""

    steps: int
    lr: float
    legacy_zero_grad: bool
    detach_layers: bool
    seed: int
    checkpoint_every: int

    def solve(self, run: Run, start: SurgeryAdapters | None = None) -> tuple[SurgeryAdapters, Tensor]:
        """Adapters on the device of the merged model, trained from `start` or from ones that change nothing, and the
        bias before every step.  # [steps, num_tasks, num_sites]"""
        data = []
        for task, pool in run.pools.items():
            order = sample_order(self.seed, task, len(pool), self.steps, run.batch_size)
            data.append(task_data(task, pool, order))
        if run.mode == "v2":
            _check_alike(data)
        with Recorder(run.merged, run.sites, run.autocast) as record:
            probe = record(data[0].first())
            sites = replace(run.sites, token_major=record.token_major)
        store = FeatureStore.like(probe, run.sites, run.cache, run.batch_size * len(data), run.autocast)
        features, targets, identities = _features_and_targets(run, store, data)

        device = device_of(run.merged)
        widths = dict(zip(run.sites.names, store.widths, strict=True))
        if start is None:
            adapters = SurgeryAdapters(len(data), widths, run.rank, tasks=run.tasks, dtype=store.dtype, seed=self.seed)
        else:
            adapters = start
        if run.mode == "v2" or device.type == "cuda":  # V1's steps need no model: they run on the CPU for other devices
            adapters.to(device)
        else:
            adapters.cpu()
        adam = Adam(self.lr, zero_grad_steps=len(data) - 1 if self.legacy_zero_grad else 0)
        trainer: Trainer
        if run.mode == "v2":
            trainer = DeepTrainer(
                adapters,
                run.merged,
                sites,
                data,
                targets,
                adam,
                detach_layers=self.detach_layers,
                autocast=run.autocast,
            )
        else:
            of_kind = FinalTrainer if adapters.kind == "relu" else LinearFinalTrainer
            trainer = of_kind(adapters, data, features, targets, adam)
        interrupted = run.interrupted(
            self.checkpoint_every,
            lr=self.lr,
            legacy_zero_grad=self.legacy_zero_grad,
            detach_layers=self.detach_layers,
            seed=self.seed,
            start=None if start is None else "closed_form",
            **identities,
        )
        with frozen(run.merged):
            bias = train(trainer, adapters, self.steps, interrupted, run.resume, run.progress)
        return adapters.to(device), bias


def _features_and_targets(
    run: Run, store: FeatureStore, data: Sequence[TaskData]
) -> tuple[list[Tensor], list[Tensor], dict[str, str]]:
    """Per task the merged model's features ("v1" only, elsewhere they change) and its expert's; then what tells the
    merged model and each expert from others; one model at a time."""
    identities = {"merged": run.identity(run.merged)}

    def of_expert(of_task: TaskData) -> Tensor:
        expert = run.expert(of_task.task)
        identity = identities[f"experts[{of_task.task!r}]"] = run.identity(expert)
        return store.features("targets", expert, identity, of_task, bar)

    passes = 2 if run.mode == "v1" else 1
    with counting_bar(passes * sum(len(of_task.used) for of_task in data), "features", "sample", run.progress) as bar:
        features = [
            store.features("features", run.merged, identities["merged"], of_task, bar)
            for of_task in data
            if run.mode == "v1"
        ]
        return features, [of_expert(of_task) for of_task in data], identities


def _check_alike(data: Sequence[TaskData]) -> None:
    """The samples of all tasks fit into one batch."""
    expected = sample_shape(data[0].first())
    for of_task in data[1:]:
        shape = sample_shape(of_task.first())
        if shape != expected:
            raise ValueError(
                f"batches[{of_task.task!r}] must hold samples like those of {data[0].task!r}, {expected}, got {shape}"
            )
