"""The pretrained encoder, its experts and the multi-task encoder: trained on the first run, read on the next."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...surgery import collect_features
from ..jobs import one_thread, progress_bar
from . import tasks, training, vit
from .tasks import TASKS, Split, load_splits
from .training import frozen_heads, train
from .vit import VisionTransformer

StateDict = dict[str, Tensor]

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Config:
    """Everything that the checkpoints depend on, besides the code."""

    seed: int = 0
    test_fraction: float = 0.3
    width: int = 64
    depth: int = 6
    num_heads: int = 4
    num_features: int = 32
    head_noise: float = 0.8
    batch_size: int = 32
    pretrain_steps: int = 500
    pretrain_rate: float = 1e-3
    expert_steps: int = 100
    expert_rate: float = 5e-4
    multi_task_steps: int = 800
    multi_task_rate: float = 1e-3

    def fingerprint(self) -> str:
        """Differs for any other setting, and for any other code of data, model or training."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for module in (tasks, training, vit):
            digest.update(Path(str(module.__file__)).read_bytes())
        return digest.hexdigest()[:12]

    def encoder(self, state: StateDict | None = None) -> VisionTransformer:
        """A randomly initialised encoder, or the one with the given parameters."""
        encoder = VisionTransformer(
            width=self.width, depth=self.depth, num_heads=self.num_heads, num_features=self.num_features
        )
        if state is not None:
            encoder.load_state_dict(state)
        return encoder


@dataclass(frozen=True)
class Experts:
    """What every merging method starts from."""

    config: Config
    train: Split
    test: Split
    heads: Tensor  # [num_tasks, classes, num_features]
    pretrained: StateDict
    experts: list[StateDict]  # in the order of TASKS
    multi_task: StateDict

    @cached_property
    def targets(self) -> list[dict[str, Tensor]]:
        """By task what its expert makes of its test images, site by site."""
        return [
            collect_features(self.config.encoder(expert), images)
            for expert, images in zip(self.experts, self.test.images, strict=True)
        ]


def save(path: Path, state: StateDict) -> None:
    """Writes beside and renames: a run that is stopped leaves no half of a checkpoint."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file(state, unfinished)
    unfinished.replace(path)


@dataclass(frozen=True)
class Training:
    """What a checkpoint is trained on, and for how long."""

    name: str
    tasks: tuple[int, ...]
    steps: int
    rate: float
    seed: int


def trainings(config: Config) -> list[Training]:
    """The pretrained encoder, which the others start from, then the experts and the multi-task encoder."""
    seeds = itertools.count(config.seed * 100 + 1)  # the first one is that of the heads
    every_task = tuple(range(len(TASKS)))
    return [
        Training(PRETRAINED, every_task, config.pretrain_steps, config.pretrain_rate, next(seeds)),
        *(
            Training(f"expert-{name}", (task,), config.expert_steps, config.expert_rate, next(seeds))
            for task, name in enumerate(TASKS)
        ),
        Training("multi-task", every_task, config.multi_task_steps, config.multi_task_rate, next(seeds)),
    ]


def make(config: Config, folder: Path, training: Training) -> None:
    """Trains one thread long and saves; a function of its arguments and of the pretrained encoder in `folder`."""
    data, _ = load_splits(config.seed, config.test_fraction)
    prototypes, heads = heads_of(config)
    is_first = training.name == PRETRAINED
    start = None if is_first else load_file(path_of(folder, PRETRAINED))
    bar = progress_bar(training.name, training.steps)
    with one_thread(), torch.random.fork_rng(devices=[]), bar as progress:
        torch.manual_seed(training.seed)
        encoder = config.encoder(start)
        train(
            encoder,
            prototypes if is_first else heads,
            data,
            tasks=training.tasks,
            steps=training.steps,
            batch_size=config.batch_size,
            learning_rate=training.rate,
            progress=progress,
        )
    save(path_of(folder, training.name), encoder.state_dict())


def heads_of(config: Config) -> tuple[Tensor, Tensor]:
    """Those of pretraining and of the tasks."""
    return frozen_heads(config.num_features, config.head_noise, config.seed * 100)


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def load_experts(config: Config, folder: Path, pool: Executor | None = None) -> Experts:
    """Reads the checkpoints in `folder`, first training and saving those that are not there: in `pool` side by side,
    or else here one after the other, with the same result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    names = [training.name for training in trainings(config)]
    missing = [training for training in trainings(config) if not path_of(folder, training.name).exists()]
    if missing and missing[0].name == PRETRAINED:
        make(config, folder, missing.pop(0))
    pretrained = load_file(path_of(folder, PRETRAINED))  # where it cannot be read, nothing else is trained
    one = partial(make, config, folder)
    list(map(one, missing) if pool is None else pool.map(one, sorted(missing, key=lambda t: -t.steps)))
    *experts, multi_task = (load_file(path_of(folder, name)) for name in names[1:])
    train_split, test_split = load_splits(config.seed, config.test_fraction)
    return Experts(config, train_split, test_split, heads_of(config)[1], pretrained, experts, multi_task)
