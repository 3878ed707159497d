"""What is compiled ahead of time of linear_merge."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from surgery_kernels.triton.linear_merge import linear_merge_out

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16):
        experts = [torch.zeros(1 << 14, dtype=dtype) for _ in range(8)]
        out = [torch.zeros_like(experts[0])]
        yield Launch(
            f"{dtype}, 8 experts",
            lambda: linear_merge_out([experts[0]], experts, [0.3] * 8, out=out),  # noqa: B023
            wide=("_merge", "_count_nonfinite"),
        )
