"""Experts: the blocks fine-tuned on one task, embeddings and head frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..zero_shot import cosines
from .bert import TextEncoder
from .texts import Split

LOGIT_SCALE = 20.0
BLOCKS = "encoder."  # what experts differ in
SORTED_TOGETHER = 8  # batches


@dataclass(frozen=True)
class Training:
    batch_size: int = 32
    rate: float = 2e-4
    warm_up: int = 10  # steps


def train(
    encoder: TextEncoder,
    head: Tensor,
    data: Split,
    how: Training,
    *,
    steps: int,
    autocast: torch.dtype | None,
    progress: tqdm,
) -> None:
    """AdamW with a rate that rises, then falls linearly; texts drawn with torch's default generator."""
    moved = [parameter.requires_grad_() for name, parameter in encoder.named_parameters() if name.startswith(BLOCKS)]
    optimizer = torch.optim.AdamW(moved, how.rate)
    warm_up = min(how.warm_up, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    for _, batch in zip(range(steps), batches(data, how.batch_size), strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            features = encoder(**batch.inputs)
        F.cross_entropy(LOGIT_SCALE * cosines(features, head), batch.labels).backward()
        optimizer.step()
        schedule.step()
        progress.update()
    encoder.requires_grad_(False)


def batches(data: Split, size: int) -> Iterator[Split]:
    """Without end, texts of similar length together, so that little of a batch is padding."""
    while True:
        lengths = data.inputs["attention_mask"].sum(1)
        for chunk in torch.randperm(len(data)).split(size * SORTED_TOGETHER):
            by_length = chunk[lengths[chunk].argsort()].split(size)
            for number in torch.randperm(len(by_length)).tolist():
                yield data[by_length[number]].shortened()
