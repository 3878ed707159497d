"""Task heads, training and accuracy of encoders from images [rows, 8, 8] to features [rows, num_features]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .tasks import NUM_CLASSES, TASKS, Split
from .vit import VisionTransformer

LOGIT_SCALE = 20.0


def frozen_heads(num_features: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Class prototypes for pretraining and for the tasks, both [num_tasks, classes, num_features]; nothing trains them.

    As CLIP's text heads, those of a task point roughly, not exactly, where pretraining put the features of a class.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_CLASSES, num_features)
    prototypes = F.normalize(torch.randn(shape, generator=generator), dim=-1).expand(len(TASKS), *shape)
    errors = torch.randn(len(TASKS), *shape, generator=generator) / num_features**0.5
    return prototypes, F.normalize(prototypes + noise * errors, dim=-1)


def classify(features: Tensor, heads: Tensor) -> Tensor:
    """Logits [rows, classes]: the scaled cosine of features and prototypes [rows or 1, classes, num_features]."""
    cosine = heads @ F.normalize(features, dim=-1).unsqueeze(-1)
    return LOGIT_SCALE * cosine.squeeze(-1)


def train(
    encoder: VisionTransformer,
    heads: Tensor,
    data: Split,
    *,
    tasks: Sequence[int],
    steps: int,
    batch_size: int,
    learning_rate: float,
    progress: tqdm,
) -> None:
    """Adam with a linearly falling rate, on images of `tasks` drawn with torch's default generator."""
    drawn_from = torch.tensor(tasks)
    optimizer = torch.optim.Adam(encoder.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        task = drawn_from[torch.randint(len(drawn_from), (batch_size,))]
        image = torch.randint(len(data.labels), (batch_size,))
        optimizer.zero_grad()
        logits = classify(encoder(data.images[task, image]), heads[task])
        F.cross_entropy(logits, data.labels[image]).backward()
        optimizer.step()
        schedule.step()
        progress.update()


def accuracy(features: Tensor, heads: Tensor, data: Split, task: int) -> float:
    """Percentage of a task's images that its head classifies correctly, from their features [images, num_features]."""
    predicted = classify(features, heads[task][None]).argmax(-1)
    return 100 * (predicted == data.labels).double().mean().item()
