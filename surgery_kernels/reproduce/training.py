"""Task heads, training and accuracy. An encoder is any callable from images [rows, 8, 8] to features [rows, num_features]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .tasks import NUM_CLASSES, Split
from .vit import VisionTransformer

LOGIT_SCALE = 20.0


def classify(features: Tensor, heads: Tensor) -> Tensor:
    """Logits: the scaled cosine between features and class prototypes [rows or 1, classes, num_features]."""
    cosine = F.normalize(heads, dim=-1) @ F.normalize(features, dim=-1).unsqueeze(-1)
    return LOGIT_SCALE * cosine.squeeze(-1)  # [rows, classes]


def task_heads(shared_head: Tensor, num_tasks: int, noise: float, seed: int) -> Tensor:
    """One frozen head per task: the pretraining prototypes plus noise.  # [num_tasks, classes, num_features]

    Like CLIP's heads, made from text, they point roughly where the features of a class lie and were never fitted to a task.
    """
    generator = torch.Generator().manual_seed(seed)
    prototypes = F.normalize(shared_head, dim=-1)
    errors = torch.randn(num_tasks, *shared_head.shape, generator=generator) / shared_head.shape[-1] ** 0.5
    return F.normalize(prototypes + noise * errors, dim=-1)


def new_head(num_features: int) -> Tensor:
    """A head to be learned, the same for all tasks.  # [1, classes, num_features]"""
    return torch.randn(1, NUM_CLASSES, num_features).div_(num_features**0.5).requires_grad_()


def train(
    encoder: VisionTransformer,
    heads: Tensor,
    data: Split,
    *,
    tasks: Sequence[int],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: tqdm,
) -> None:
    """Adam with a linearly falling rate, each image drawn from one of `tasks`.

    heads is [num_tasks, classes, num_features], or [1, classes, num_features] for one head shared by all tasks; it is
    learned too if it requires a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_from = torch.tensor(tasks)
    parameters = [*encoder.parameters(), *([heads] if heads.requires_grad else [])]
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        task = drawn_from[torch.randint(len(drawn_from), (batch_size,), generator=generator)]
        image = torch.randint(len(data.labels), (batch_size,), generator=generator)
        logits = classify(encoder(data.images[task, image]), heads if len(heads) == 1 else heads[task])
        optimizer.zero_grad()
        F.cross_entropy(logits, data.labels[image]).backward()
        optimizer.step()
        schedule.step()
        progress.update()


@torch.no_grad()
def accuracy(encoder: Callable[[Tensor], Tensor], heads: Tensor, data: Split, task: int) -> float:
    """Percentage of a task's images that its head classifies correctly."""
    predicted = classify(encoder(data.images[task]), heads[task][None]).argmax(-1)
    return 100 * (predicted == data.labels).double().mean().item()
