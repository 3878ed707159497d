"""A merge, and what a repair of it comes to: accuracy on texts that the repair saw and on texts that nothing saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...merging import entropy_objective, merge_state_dicts
from ...surgery import SurgeryModel, representation_bias
from ..jobs import Job, processes, run_jobs
from ..repair import Setting, repair
from ..report import average
from ..zero_shot import cosines
from .experts import Lab, Place, StateDict
from .methods import ADAMERGING, drawn
from .texts import Split
from .training import LOGIT_SCALE

ENDS: dict[str, Callable[[Lab], dict[str, nn.Module]]] = {  # the rows that are no merge: each task's encoder
    "pretrained": lambda lab: dict.fromkeys(lab.tasks, lab.encoder()),
    "individual": lambda lab: {task: expert_of(lab, task) for task in lab.tasks},
}
BATCH = 64  # texts in one pass, where there are no steps
BIAS_TEXTS = 32  # held out, for the bias by depth


@dataclass(frozen=True)
class Outcome:
    """What a row of the table says; accuracies in percent, one per task."""

    held_out: list[float]  # on texts that no merge and no repair saw
    fitted: list[float]  # on those from which merges and repairs had theirs, without labels
    bias: float  # mean L1 distance of the final features from the experts', of texts held out
    by_depth: dict[str, float]  # site -> the same at every site, of some of them; of the rows that a plot shows
    num_parameters: int = 0  # of a task, beside the model
    seconds: float = 0.0  # that the repair took
    cpu_seconds: float = 0.0  # that it had of a processor


@lru_cache(maxsize=1)
def lab_at(place: Place) -> Lab:
    return Lab(place)


def measure_jobs(place: Place, merges: Mapping[str, Mapping[str, Any]], jobs: Sequence[Job]) -> dict[Job, Outcome]:
    """All jobs, and those of the ends, side by side."""
    jobs = [*jobs, *map(Job, ENDS)]
    with processes() as pool:
        return run_jobs(pool, jobs, partial(run_merge, place, merges), partial(run_job, place))


def run_merge(place: Place, merges: Mapping[str, Mapping[str, Any]], name: str) -> StateDict:
    """The merged blocks; none where there is nothing to merge."""
    if name in ENDS:
        return {}
    lab, options = lab_at(place), dict(merges[name])
    with autocast_of(lab):
        if options["method"] == "adamerging":
            given = {key: value for key, value in ADAMERGING.items() if key != "batch_size"}
            options |= {"objective": entropy(lab), **given}
        return merge_state_dicts(lab.base(), [lab.expert(task) for task in lab.tasks], progress=False, **options)


def entropy(lab: Lab) -> Any:
    """Of the predictions for unlabeled texts, as AdaMerging's paper has it."""
    return entropy_objective(
        lab.encoder(),
        {task: lab.data[task].splits["adapt"].inputs for task in lab.tasks},
        lambda features, task: LOGIT_SCALE * cosines(features, lab.data[task].head),
        batch_size=ADAMERGING["batch_size"],
        seed=lab.place.config.seed,
    )


def run_job(place: Place, job: Job, blocks: StateDict) -> Outcome:
    """Repairs and measures a merged model; a function of its arguments alone."""
    lab = lab_at(place)
    if job.merge in ENDS:
        return measure(lab, ENDS[job.merge](lab))
    merged = lab.encoder(blocks)
    if job.setting is None:
        return measure(lab, dict.fromkeys(lab.tasks, merged), depths=job in drawn())
    start, cpu_start = time.perf_counter(), time.process_time()
    repaired = repaired_by(lab, merged, job.setting)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    size = repaired.adapters.num_parameters if isinstance(repaired, SurgeryModel) else 0
    outcome = measure(lab, dict.fromkeys(lab.tasks, repaired), depths=job in drawn())
    return replace(outcome, num_parameters=size, seconds=seconds, cpu_seconds=cpu_seconds)


def repaired_by(lab: Lab, merged: nn.Module, setting: Setting) -> nn.Module:
    """From unlabeled texts, the first of those that adaptation may see."""
    texts = {task: lab.data[task].splits["adapt"][: setting.num_samples].inputs for task in lab.tasks}
    return repair(
        merged,
        lab.pretrained,
        {task: partial(expert_of, lab, task) for task in lab.tasks},
        texts,
        setting,
        batch_size=BATCH,
        autocast=lab.place.autocast,
        gradient={"seed": lab.place.config.seed},
    )


def expert_of(lab: Lab, task: str) -> nn.Module:
    return lab.encoder(lab.expert(task))


@torch.no_grad()
def measure(lab: Lab, models: Mapping[str, nn.Module], *, depths: bool = False) -> Outcome:
    """Each task's model on its texts, with the adapters of the task where it has some."""
    held_out: list[float] = []
    fitted: list[float] = []
    distances, by_depth = [], []
    for task, model in models.items():
        data = lab.data[task]
        options: dict[str, Any] = {"task": task} if isinstance(model, SurgeryModel) else {}
        encode = partial(model, **options)
        features = features_of(lab, encode, data.splits["held_out"])
        distances.append((features - target_features(lab.place, task)).abs().mean().item())
        held_out.append(accuracy(features, data.head, data.splits["held_out"]))
        fitted.append(accuracy(features_of(lab, encode, data.splits["adapt"]), data.head, data.splits["adapt"]))
        if depths:
            some = data.splits["held_out"][:BIAS_TEXTS].shortened().inputs
            by_depth.append(representation_bias(model, expert_of(lab, task), some, **options))
    sites = by_depth[0] if by_depth else ()
    bias = {site: average([of_task[site] for of_task in by_depth]) for site in sites}
    return Outcome(held_out, fitted, average(distances), bias)


def accuracy(features: Tensor, head: Tensor, split: Split) -> float:
    """Percentage of the texts whose nearest prototype is that of their class."""
    return 100 * (cosines(features, head).argmax(-1) == split.labels).double().mean().item()


@lru_cache(maxsize=32)
def target_features(place: Place, task: str) -> Tensor:
    """The expert's, of the texts held out."""
    lab = lab_at(place)
    return features_of(lab, expert_of(lab, task), lab.data[task].splits["held_out"])


@torch.no_grad()
def features_of(lab: Lab, model: Any, split: Split) -> Tensor:
    """Features [texts, width], computed on texts of similar length together."""
    order = split.inputs["attention_mask"].sum(1).argsort()
    with autocast_of(lab):
        found = [model(**split[rows].shortened().inputs).float() for rows in order.split(BATCH)]
    return torch.cat(found)[order.argsort()]


def autocast_of(lab: Lab) -> torch.autocast:
    dtype = lab.place.autocast
    return torch.autocast("cpu", dtype, enabled=dtype is not None)
