"""Surgery on the merged models: one job per merge and setting, side by side in processes of one thread each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import SurgeryModel, attach, calibrate, fit, representation_bias
from .experts import Config, Experts, StateDict, load_experts, progress_bar
from .merges import ADAMERGING_STEPS, merge
from .tasks import TASKS
from .training import accuracy

FORWARD_BATCH = 64  # images in one pass, where there are no steps
STEPS = 1000  # per task: 500 rounds of two batches, as in the papers


@dataclass(frozen=True)
class Setting:
    """One way to repair a merged model; the defaults are the paper's."""

    mode: str  # "v1" corrects the final representation, "v2" every block too; "calibrate" moves the weights themselves
    rank: int = 0  # of adapters
    steps: int = STEPS
    num_images: int | None = None  # unlabeled images of each task; None takes all
    on_train: bool = False  # images of the training split instead of the test split
    solver: str = "gradient"  # or "closed_form", which takes no steps


@dataclass(frozen=True)
class Job:
    merge: str
    setting: Setting | None = None  # None leaves the merge as it is


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
    surgery = repair(experts, merged, job.setting)
    seconds = time.perf_counter() - start
    return replace(measure(experts, [surgery] * len(TASKS)), seconds=seconds)


def repair(experts: Experts, merged: nn.Module, setting: Setting) -> nn.Module:
    """Fits adapters on unlabeled images and attaches them, or calibrates."""
    images = (experts.train if setting.on_train else experts.test).images[:, : setting.num_images]
    if setting.mode == "calibrate":
        of_tasks = (dict(zip(TASKS, x, strict=True)) for x in (experts.experts, images))
        calibrated = calibrate(merged, experts.pretrained, *of_tasks, batch_size=FORWARD_BATCH, progress=False)
        return experts.config.encoder(calibrated.state)
    options: dict[str, Any] = {"solver": setting.solver, "batch_size": FORWARD_BATCH}
    if setting.solver == "gradient":  # with legacy_zero_grad, as the published results were made
        options = {"steps": setting.steps, "legacy_zero_grad": True, "seed": experts.config.seed}
    fitted = fit(
        merged,
        dict(zip(TASKS, experts.experts, strict=True)),
        dict(zip(TASKS, images, strict=True)),
        setting.mode,
        rank=setting.rank,
        progress=False,
        **options,
    )
    return attach(merged, fitted.adapters)


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


def run_jobs(
    config: Config, folder: Path, jobs: Sequence[Job], *, adamerging_steps: int = ADAMERGING_STEPS
) -> dict[Job, Outcome]:
    """All jobs, as many at a time as torch has threads. The experts must lie in `folder`."""
    names = list(dict.fromkeys(job.merge for job in jobs))
    # spawned: a fork of a process whose thread pools run may hang
    pool = ProcessPoolExecutor(
        torch.get_num_threads(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool, progress_bar("surgery", len(names) + len(jobs), "job") as progress:

        def submit(*arguments: Any) -> Future[Any]:
            future = pool.submit(*arguments)
            future.add_done_callback(lambda _: progress.update())
            return future

        try:
            # AdaMerging takes long: it starts first, and its repairs come last
            merges = {name: submit(run_merge, config, folder, name, adamerging_steps) for name in reversed(names)}
            futures = {
                job: submit(run_job, config, folder, job, merges[name].result())
                for name in names
                for job in jobs
                if job.merge == name
            }
            return {job: futures[job].result() for job in jobs}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
