"""What is compiled ahead of time of masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.masks import masks

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        experts = [torch.zeros(64, 1 << 10, dtype=dtype) for _ in range(8)]
        name = str(dtype).removeprefix("torch.")
        yield Launch(f"{name}, 8 experts", lambda: masks([experts[0]], experts, [0.3] * 8))  # noqa: B023
    yield Launch("by rank", lambda: masks([], experts[:1], [0.3], "della", [0.1]))
