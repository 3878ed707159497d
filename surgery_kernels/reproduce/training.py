"""Pretraining, frozen task heads, fine-tuning and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .tasks import NUM_CLASSES, Split
from .vit import VisionTransformer

LOGIT_SCALE = 20.0


def logits(features: Tensor, heads: Tensor) -> Tensor:
    """Scaled cosine between each row's features [rows, num_features] and its own heads [rows or 1, classes, num_features]."""
    features = F.normalize(features, dim=-1).unsqueeze(1)
    return LOGIT_SCALE * (features * F.normalize(heads, dim=-1)).sum(-1)


def train(
    encoder: VisionTransformer,
    heads: Tensor,
    data: Split,
    *,
    tasks: list[int],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: tqdm,
) -> None:
    """Adam on random images of the given tasks; the heads [num_tasks, classes, num_features] learn too if they require gradients."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor(tasks)
    learned = [*encoder.parameters(), *([heads] if heads.requires_grad else [])]
    optimizer = torch.optim.Adam(learned, learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        task = choices[torch.randint(len(choices), (batch_size,), generator=generator)]
        image = torch.randint(len(data.labels), (batch_size,), generator=generator)
        predicted = logits(encoder(data.images[task, image]), heads[task])
        optimizer.zero_grad()
        F.cross_entropy(predicted, data.labels[image]).backward()
        optimizer.step()
        schedule.step()
        progress.update()


@torch.no_grad()
def accuracies(encoder: nn.Module, heads: Tensor, data: Split) -> list[float]:
    """The share of images classified correctly, in percent, for each task with its own head."""
    return [
        100 * (logits(encoder(images), head[None]).argmax(-1) == data.labels).float().mean().item()
        for images, head in zip(data.images, heads, strict=True)
    ]
