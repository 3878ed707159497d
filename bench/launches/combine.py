"""What is compiled ahead of time of combine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.combine import combine, combine_backward

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16):
        task_vectors = [torch.zeros(1 << 14, dtype=dtype) for _ in range(8)]
        block_offsets = torch.tensor([0, 1 << 13, 1 << 14])
        coefficients = torch.zeros(8, 2)
        yield Launch(
            f"{dtype}, 8 experts",
            lambda: combine(task_vectors[0], task_vectors, coefficients, block_offsets),  # noqa: B023
            wide=("_combine",),
        )
        yield Launch(
            f"{dtype}, 8 experts, backward",
            lambda: combine_backward(task_vectors[0], task_vectors, block_offsets),  # noqa: B023
            wide=("_differentiate",),
        )
