"""What is compiled ahead of time of census."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.census import census

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        base, *experts = [torch.zeros(64, 1 << 10, dtype=dtype) for _ in range(9)]
        name = str(dtype).removeprefix("torch.")
        yield Launch(f"{name}, 8 experts", lambda: census([base], experts, 8))  # noqa: B023
