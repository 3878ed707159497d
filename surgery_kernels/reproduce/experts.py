"""The pretrained encoder, one expert per task and their cache: trained on the first run, read on the next."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from . import tasks, training, vit
from .tasks import TASKS, Split, load_splits
from .training import new_head, task_heads, train
from .vit import VisionTransformer

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """Everything the checkpoints depend on, besides the code."""

    seed: int = 0
    test_fraction: float = 0.3
    width: int = 64
    depth: int = 6
    num_heads: int = 4
    num_features: int = 32
    pretrain_steps: int = 450
    expert_steps: int = 150
    multi_task_steps: int = 800
    batch_size: int = 32
    pretrain_rate: float = 1e-3
    expert_rate: float = 5e-4
    multi_task_rate: float = 1e-3
    head_noise: float = 0.8

    def fingerprint(self) -> str:
        """Changes with any setting and with the code that makes data, model or training."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for module in (tasks, training, vit):
            digest.update(Path(str(module.__file__)).read_bytes())
        return digest.hexdigest()[:12]


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

    def encoder(self, state: StateDict) -> VisionTransformer:
        return load_encoder(self.config, state)


def new_encoder(config: Config) -> VisionTransformer:
    return VisionTransformer(
        width=config.width, depth=config.depth, num_heads=config.num_heads, num_features=config.num_features
    )


def load_encoder(config: Config, state: StateDict) -> VisionTransformer:
    encoder = new_encoder(config)
    encoder.load_state_dict(state)
    return encoder


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose much where other programs keep it busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class Cache:
    """State dicts as safetensors files in one folder."""

    def __init__(self, folder: Path, *, retrain: bool) -> None:
        self.folder = folder
        self.stale = {path.name for path in folder.glob("*.safetensors")} if retrain else set()
        folder.mkdir(parents=True, exist_ok=True)
