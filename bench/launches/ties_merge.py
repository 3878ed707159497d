"""What is compiled ahead of time of ties_merge."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.ties_merge import ties_merge, ties_split

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16):
        experts = [torch.zeros(1 << 14, dtype=dtype) for _ in range(8)]
        density, wide = [0.2] * 8, ("_merge", "_norms")
        yield Launch(f"{dtype}, 8 experts", lambda: ties_merge(experts[0], experts, density), wide)  # noqa: B023
        weighted = {"weights": [0.3] * 8, "semantics": "mergekit", "rescale": True}
        yield Launch(
            f"{dtype}, 8 experts, mergekit",
            lambda: ties_merge(experts[0], experts, density, **weighted),  # noqa: B023
            wide,
        )
        yield Launch(f"{dtype}, 8 experts, split", lambda: ties_split(experts[0], experts, density), wide)  # noqa: B023
    yield Launch(f"{dtype}, 8 experts, max", lambda: ties_merge(experts[0], experts, density, reduce="max"), wide)
