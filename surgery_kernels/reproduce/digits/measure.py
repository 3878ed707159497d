"""Every merge of the digits experiment, repaired and measured on the test images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery import SurgeryModel, collect_features
from ..jobs import Job, run_jobs
from ..repair import Setting, repair
from .experts import Config, Experts, StateDict, load_experts
from .merges import ADAMERGING_STEPS, merge
from .tasks import TASKS
from .training import accuracy

FORWARD_BATCH = 64  # images in one pass, where there are no steps


@dataclass(frozen=True)
class Outcome:
    """What a job comes to, measured on the test images."""

    accuracy: list[float]  # percent, one per task
    bias: dict[str, float]  # site -> mean L1 distance to the expert's features, averaged over tasks
    features: Tensor  # [num_images, num_features], final, of the first task
    seconds: float = 0.0  # that the fit took
    cpu_seconds: float = 0.0  # that it had of a processor

    @property
    def final_bias(self) -> float:
        return list(self.bias.values())[-1]


def measure_jobs(
    pool: Executor, config: Config, folder: Path, jobs: Sequence[Job], *, adamerging_steps: int = ADAMERGING_STEPS
) -> dict[Job, Outcome]:
    """All jobs, side by side in `pool`. The experts must lie in `folder`."""
    merged = partial(run_merge, config, folder, adamerging_steps=adamerging_steps)
    return run_jobs(pool, jobs, merged, partial(run_job, config, folder))


@lru_cache(maxsize=1)
def experts_at(config: Config, folder: Path) -> Experts:
    return load_experts(config, folder)


def run_merge(config: Config, folder: Path, name: str, adamerging_steps: int) -> StateDict:
    return merge(experts_at(config, folder), name, adamerging_steps=adamerging_steps)


def run_job(config: Config, folder: Path, job: Job, state: StateDict) -> Outcome:
    """Repairs and measures a merged model; a function of its arguments alone."""
    experts = experts_at(config, folder)
    merged = config.encoder(state)
    if job.setting is None:
        return measure(experts, [merged] * len(TASKS))
    start, cpu_start = time.perf_counter(), time.process_time()
    repaired = repaired_by(experts, merged, job.setting)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return replace(measure(experts, [repaired] * len(TASKS)), seconds=seconds, cpu_seconds=cpu_seconds)


def repaired_by(experts: Experts, merged: nn.Module, setting: Setting) -> nn.Module:
    """From unlabeled images; with legacy_zero_grad, as the published results were made."""
    images = (experts.train if setting.on_train else experts.test).images[:, : setting.num_samples]
    return repair(
        merged,
        experts.pretrained,
        dict(zip(TASKS, experts.experts, strict=True)),
        dict(zip(TASKS, images, strict=True)),
        setting,
        batch_size=FORWARD_BATCH,
        gradient={"legacy_zero_grad": True, "seed": experts.config.seed},
    )


def measure(experts: Experts, models: Sequence[nn.Module]) -> Outcome:
    """Each task's model on its test images, with the adapters of the task where it has some; each runs once."""
    accuracies, biases, of_first = [], [], torch.empty(0)
    for task, (name, model) in enumerate(zip(TASKS, models, strict=True)):
        features = collect_features(model, experts.test.images[task], **of_task(model, name))
        biases.append({site: float((x - experts.targets[task][site]).abs().mean()) for site, x in features.items()})
        *_, final = features.values()
        accuracies.append(accuracy(final, experts.heads, experts.test, task))
        of_first = final if task == 0 else of_first
    bias = {site: sum(values[site] for values in biases) / len(biases) for site in biases[0]}
    return Outcome(accuracies, bias, of_first)


@torch.no_grad()
def accuracies(experts: Experts, states: Sequence[StateDict]) -> list[float]:
    """Of each task's model on its test images."""
    found = []
    for task, (state, images) in enumerate(zip(states, experts.test.images, strict=True)):
        encoder = experts.config.encoder(state)
        features = torch.cat([encoder(batch) for batch in images.split(FORWARD_BATCH)])
        found.append(accuracy(features, experts.heads, experts.test, task))
    return found


def of_task(model: nn.Module, task: str) -> dict[str, Any]:
    """Chooses the adapters of the task, where the model has some."""
    return {"task": task} if isinstance(model, SurgeryModel) else {}
