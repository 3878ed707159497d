"""What is compiled ahead of time of weighted_merge."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.weighted_merge import weighted_merge_limits, weighted_merge_out, weighted_merge_scored_out

from . import Launch


def launches() -> Iterator[Launch]:
    numbers = torch.tensor([[0.0, 1.0, 1.0]] * 8, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        experts = [torch.zeros(1 << 7, 1 << 7, dtype=dtype) for _ in range(8)]
        importance = [torch.zeros(1 << 7, 1 << 7) for _ in range(8)]
        out, name = [torch.zeros_like(experts[0])], str(dtype).removeprefix("torch.")
        yield Launch(
            f"{name}, 8 experts, importance",
            lambda: weighted_merge_out([], experts, importance, [1.0] * 8, out=out),  # noqa: B023
            wide=("_mean",),
        )
        if dtype == torch.bfloat16:
            continue  # scores take longer than it takes to read them
        for inter in ("paper", "raw"):
            yield Launch(
                f"{name}, 8 experts, scores, {inter}",
                lambda: weighted_merge_scored_out([experts[0]], experts, numbers, numbers, inter, out=out),  # noqa: B023
                wide=("_merge_scored",),
            )
        yield Launch(
            f"{name}, 8 experts, limits",
            lambda: weighted_merge_limits([experts[0]], experts, numbers, [5] * 8),  # noqa: B023
            wide=("_count",),
        )
