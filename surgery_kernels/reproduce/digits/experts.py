"""The pretrained encoder, its experts and the multi-task encoder: trained on the first run, read on the next."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..jobs import one_thread, progress_bar
from . import tasks, training, vit
from .tasks import TASKS, Split, load_splits
from .training import frozen_heads, train
from .vit import VisionTransformer

StateDict = dict[str, Tensor]


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


def save(path: Path, state: StateDict) -> None:
    """Writes beside and renames: a run that is stopped leaves no half of a checkpoint."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file(state, unfinished)
    unfinished.replace(path)


@one_thread()
def load_experts(config: Config, folder: Path) -> Experts:
    """Reads the checkpoints in `folder`, first training and saving those that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    train_split, test_split = load_splits(config.seed, config.test_fraction)
    seeds = itertools.count(config.seed * 100)  # of heads and checkpoints, in order
    prototypes, heads = frozen_heads(config.num_features, config.head_noise, next(seeds))
    every_task = range(len(TASKS))

    def checkpoint(
        name: str, start: StateDict | None, heads: Tensor, tasks: Sequence[int], steps: int, rate: float
    ) -> StateDict:
        path, seed = folder / f"{name}.safetensors", next(seeds)
        if not path.exists():
            with torch.random.fork_rng(devices=[]), progress_bar(name, steps) as progress:
                torch.manual_seed(seed)
                encoder = config.encoder(start)
                train(
                    encoder,
                    heads,
                    train_split,
                    tasks=tasks,
                    steps=steps,
                    batch_size=config.batch_size,
                    learning_rate=rate,
                    progress=progress,
                )
            save(path, encoder.state_dict())
        return load_file(path)

    pretrained = checkpoint("pretrained", None, prototypes, every_task, config.pretrain_steps, config.pretrain_rate)
    experts = [
        checkpoint(f"expert-{name}", pretrained, heads, [task], config.expert_steps, config.expert_rate)
        for task, name in enumerate(TASKS)
    ]
    multi_task = checkpoint(
        "multi-task", pretrained, heads, every_task, config.multi_task_steps, config.multi_task_rate
    )
    return Experts(config, train_split, test_split, heads, pretrained, experts, multi_task)
