"""What is compiled ahead of time of gram."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.gram import gram

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for num_tasks in (2, 8, 20):
            experts = [torch.zeros(64, 1 << 10, dtype=dtype) for _ in range(num_tasks)]
            for axis in ("tensor", "column"):
                yield Launch(
                    f"{dtype}, {num_tasks} experts, {axis}",
                    lambda: gram([experts[0]], experts, num_tasks, axis, True, "propagate"),  # noqa: B023
                )
