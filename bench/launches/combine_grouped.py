"""What is compiled ahead of time of merges of groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.combine_grouped import combine_grouped, combine_grouped_backward

from . import Launch


def launches() -> Iterator[Launch]:
    block_offsets = torch.tensor([0, 1 << 13, 1 << 14])
    for dtype in (torch.float32, torch.bfloat16):
        task_vectors = [torch.zeros(1 << 14, dtype=dtype) for _ in range(8)]
        for groups in (10, 256):
            coefficients = torch.zeros(8, 2, groups)
            yield Launch(
                f"{dtype}, 8 experts, {groups} groups",
                lambda: combine_grouped(task_vectors[0], task_vectors, coefficients, block_offsets, 1),  # noqa: B023
                wide=("_merge",),
            )
            yield Launch(
                f"{dtype}, 8 experts, {groups} groups, backward",
                lambda: combine_grouped_backward(task_vectors[0], task_vectors, block_offsets, groups, 1),  # noqa: B023
                wide=(),
            )
