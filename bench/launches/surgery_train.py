"""What is compiled ahead of time of surgery_train: the final representations of ViT-B and ViT-L."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from surgery_kernels.triton import surgery_train

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype, dim, rank, batch in (
        (torch.float32, 512, 16, 16),
        (torch.float32, 512, 16, 64),
        (torch.bfloat16, 768, 64, 16),
        (torch.float64, 512, 16, 16),
        (torch.float64, 512, 32, 16),
    ):
        wide = ("train_kernel",) if dtype == torch.float32 else ()  # 16-bit images are few and read one by one
        name = f"{dtype}, dim {dim}, rank {rank}, batch {batch}".removeprefix("torch.")
        yield Launch(name, train(dtype, dim, rank, batch), wide)
    yield Launch("by ops", train(torch.float32, 512, 128, batch=64), ("adam_kernel",))


def train(dtype: torch.dtype, dim: int, rank: int, batch: int) -> Callable[[], object]:
    def call() -> None:
        features = [torch.zeros(32, dim, dtype=dtype) for _ in range(8)]
        compute = torch.promote_types(dtype, torch.float32)
        down, up = torch.zeros(8, rank, dim, dtype=compute), torch.zeros(8, dim, rank, dtype=compute)
        moments = [x.new_zeros(2, *x.shape) for x in (down, up)]
        indices = torch.zeros(1, 8, batch, dtype=torch.int64)
        surgery_train.surgery_train(features, features, down, up, *moments, indices)

    return call
