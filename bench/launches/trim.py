"""What is compiled ahead of time of trim."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.trim import DIRECT, trim_thresholds

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16):
        experts = [torch.zeros(2 * DIRECT, dtype=dtype) for _ in range(8)]
        yield Launch(
            f"{dtype}, 8 experts",
            lambda: trim_thresholds(experts[0], experts, [0.2] * 8, "mergekit"),  # noqa: B023
            wide=("_gather", "_count_ties") if dtype == torch.float32 else ("_count", "_count_ties"),
        )
