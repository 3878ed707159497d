"""FusionBench's Concrete algorithms on a small network, with its own options, loops and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

TASKS, CLASSES = ["task_0", "task_1"], 5

OPTIONS: dict[str, Any] = {
    "optimizer": "adam", "lr": 0.05, "base_lr": 1.0, "adamerging_lr": 0.02, "scaling_factor": 0.3, "max_steps": 4,
    "max_adamerging_steps": 3, "save_interval": 500, "initial_logits": 0.0, "temperature": 0.5,
    "eval_mask_type": "continuous", "mask_checkpoint": None, "clamp_weights": False, "tie_weights": True,
    "strict": False, "skip_training": False,
}  # fmt: skip


def models() -> dict[str, nn.Module]:
    """The pretrained network and an expert of each task, a large step away."""
    found = {}
    for i, name in enumerate(["_pretrained_", *TASKS]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found[name] = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES))
            torch.manual_seed(i)
            with torch.no_grad():
                for p in found[name].parameters() if i else ():
                    p += torch.randn(p.shape)
    return found


def batch(task: str, index: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1_000 * TASKS.index(task) + index))


def entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return -(p * (p + 1e-8).log()).sum(-1).mean()


def batches(task: str) -> Iterator[tuple[Tensor]]:
    index = 0
    while True:
        yield (batch(task, index),)
        index += 1


def run(
    algorithm: type, began: Callable[[Any, Any], None] = lambda algorithm, module: None, **options: Any
) -> nn.Module:
    """What an algorithm of theirs, or one of ours in its place, makes of the models.

    began: is called with the algorithm and the model that is learned when the mask is learned, and with None after it.
    """
    from fusion_bench.modelpool import BaseModelPool
    from omegaconf import DictConfig

    iterators = {task: batches(task) for task in TASKS}

    class Small(algorithm):  # type: ignore[misc]
        def setup_zero_shot_classification_head(self) -> None:
            pass

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

        def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Tensor]]:
            return iterators[task]

        def compute_logits(self, module: nn.Module, images: Tensor, task: str) -> Tensor:
            return module(images)

        def train_mask(self, module: Any, mask_model: Any) -> None:
            began(self, module)
            super().train_mask(module, mask_model)
            began(self, None)

    return Small(DictConfig({**OPTIONS, **options})).run(BaseModelPool(models()))
