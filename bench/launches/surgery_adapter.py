"""What is compiled ahead of time of surgery_adapter: forward and backward at the widths of ViT-B."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from surgery_kernels.triton import surgery_adapter

from . import Launch

KERNELS = ("forward_kernel", "backward_rows_kernel", "backward_adapter_kernel")


def launches() -> Iterator[Launch]:
    for features, adapter, rank in (
        (torch.float32, torch.float32, 16),
        (torch.float32, torch.float32, 64),
        (torch.bfloat16, torch.float32, 16),
        (torch.bfloat16, torch.float32, 64),
        (torch.bfloat16, torch.bfloat16, 64),
        (torch.bfloat16, torch.float32, 256),
    ):
        yield Launch(f"{name(features)}, {name(adapter)}, rank {rank}", both(features, adapter, rank), KERNELS)
    yield Launch("float32, linear with a bias", linear)
    yield Launch("float64", both(torch.float64, torch.float64, 16))
    yield Launch("float16, task_index", by_task_index)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def both(features_dtype: torch.dtype, adapter_dtype: torch.dtype, rank: int) -> Callable[[], object]:
    def call() -> None:
        features = torch.zeros(8, 2, 50, 768, dtype=features_dtype)
        down, up = torch.zeros(8, rank, 768, dtype=adapter_dtype), torch.zeros(8, 768, rank, dtype=adapter_dtype)
        corrected, means, hidden = surgery_adapter.surgery_adapter(features, down, up, None, True, True)
        surgery_adapter.surgery_adapter_backward(corrected, means, features, down, up, None, hidden, True, True)

    return call


def linear() -> None:
    features, bias = torch.zeros(8, 2, 50, 768), torch.zeros(8, 768)
    down, up = torch.zeros(8, 16, 768), torch.zeros(8, 768, 16)
    corrected, means, hidden = surgery_adapter.surgery_adapter(features, down, up, None, True, True, bias, "none")
    surgery_adapter.surgery_adapter_backward(
        corrected, means, features, down, up, None, hidden, True, True, True, "none"
    )


def by_task_index() -> None:
    features, index = torch.zeros(64, 512, dtype=torch.float16), torch.zeros(64, dtype=torch.int64)
    down, up = torch.zeros(8, 16, 512), torch.zeros(8, 512, 16)
    corrected, _, hidden = surgery_adapter.surgery_adapter(features, down, up, index, False, True)
    surgery_adapter.surgery_adapter_backward(corrected, None, features, down, up, index, hidden, True, True)
