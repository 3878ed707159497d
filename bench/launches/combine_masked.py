"""What is compiled ahead of time of masked merges."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.combine_masked import combine_masked, combine_masked_backward

from . import Launch


def launches() -> Iterator[Launch]:
    block_offsets, logits = torch.tensor([0, 1 << 13, 1 << 14]), torch.zeros(1 << 14)
    coefficients, means = torch.zeros(8, 2), torch.zeros(2, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        task_vectors = [torch.zeros(1 << 14, dtype=dtype) for _ in range(8)]
        merge = (task_vectors[0], task_vectors, coefficients, block_offsets, logits)
        for temperature, seed in ((0.5, 1), (0.7, 1), (1.0, None)):
            name = f"{dtype}, 8 experts, temperature {temperature}, {'drawn' if seed else 'without noise'}"
            yield Launch(name, lambda: combine_masked(*merge, temperature, seed), wide=("_merge",))  # noqa: B023
            yield Launch(
                f"{name}, backward",
                lambda: combine_masked_backward(*merge, means, temperature, seed),  # noqa: B023
                wide=(),
            )
