"""Every merge of the digits experiment, repaired and measured on the test images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery import SurgeryModel, representation_bias
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

    @property
    def final_bias(self) -> float:
        return list(self.bias.values())[-1]


def measure_jobs(
    config: Config, folder: Path, jobs: Sequence[Job], *, adamerging_steps: int = ADAMERGING_STEPS
) -> dict[Job, Outcome]:
    """All jobs, side by side. The experts must lie in `folder`."""
    merged = partial(run_merge, config, folder, adamerging_steps=adamerging_steps)
    return run_jobs(jobs, merged, partial(run_job, config, folder))


@lru_cache(maxsize=1)
def _experts(config: Config, folder: Path) -> Experts:
    return load_experts(config, folder)


def run_merge(config: Config, folder: Path, name: str, adamerging_steps: int) -> StateDict:
    return merge(_experts(config, folder), name, adamerging_steps=adamerging_steps)


def run_job(config: Config, folder: Path, job: Job, state: StateDict) -> Outcome:
    """Repairs and measures a merged model; a function of its arguments alone."""
    experts = _experts(config, folder)
    merged = config.encoder(state)
    if job.setting is None:
        return measure(experts, [merged] * len(TASKS))
    start = time.perf_counter()
    repaired = repaired_by(experts, merged, job.setting)
    seconds = time.perf_counter() - start
    return replace(measure(experts, [repaired] * len(TASKS)), seconds=seconds)


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


@torch.no_grad()
def measure(experts: Experts, models: Sequence[nn.Module]) -> Outcome:
    """Each task's model on its test images, with the adapters of the task where it has some."""
    accuracies, biases = [], []
    for task, (name, model) in enumerate(zip(TASKS, models, strict=True)):
        expert, images = experts.config.encoder(experts.experts[task]), experts.test.images[task]
        options = of_task(model, name)
        accuracies.append(accuracy(partial(model, **options), experts.heads, experts.test, task))
        biases.append(representation_bias(model, expert, images, **options))
    bias = {site: sum(values[site] for values in biases) / len(biases) for site in biases[0]}
    return Outcome(accuracies, bias, models[0](experts.test.images[0], **of_task(models[0], TASKS[0])))


def of_task(model: nn.Module, task: str) -> dict[str, Any]:
    """Chooses the adapters of the task, where the model has some."""
    return {"task": task} if isinstance(model, SurgeryModel) else {}
