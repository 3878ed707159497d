"""What is compiled ahead of time of ties_merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from surgery_kernels.triton import ties_one_read
from surgery_kernels.triton.ties_merge import ties_merge, ties_merge_out, ties_split
from surgery_kernels.triton.trim import DIRECT

from . import Launch

SIZE, NUM_TASKS = 1 << 14, 8


def launches() -> Iterator[Launch]:
    density, wide = [0.2] * NUM_TASKS, ("_merge", "_norms")
    weighted = {"weights": [0.3] * NUM_TASKS, "semantics": "mergekit", "rescale": True}
    for dtype in (torch.float32, torch.bfloat16):
        experts = [torch.zeros(SIZE, dtype=dtype) for _ in range(NUM_TASKS)]
        yield Launch(f"{dtype}, 8 experts", lambda: ties_merge(experts[0], experts, density), wide)  # noqa: B023
        yield Launch(
            f"{dtype}, 8 experts, mergekit",
            lambda: ties_merge(experts[0], experts, density, **weighted),  # noqa: B023
            wide,
        )
        yield Launch(f"{dtype}, 8 experts, split", lambda: ties_split(experts[0], experts, density), wide)  # noqa: B023
        for name, options in narrowed().items():
            # a byte of a mask lasts for 8 lanes
            loads = () if "keep" in options else wide
            yield Launch(f"{dtype}, 8 experts, {name}", lambda: merge(experts, options), loads)  # noqa: B023
    yield Launch(f"{dtype}, 8 experts, max", lambda: ties_merge(experts[0], experts, density, reduce="max"), wide)
    for semantics in ("paper", "mergekit"):
        yield Launch(
            f"float32, 8 experts, {semantics}, one read",
            lambda: merge_once(semantics=semantics),  # noqa: B023
            ("_merge_near",),
        )


def merge_once(**options: Any) -> None:
    """As tensors that are large enough are merged."""
    experts = [torch.zeros(2 * DIRECT) for _ in range(NUM_TASKS)]
    before, ties_one_read.ONE_READ_FROM = ties_one_read.ONE_READ_FROM, 0
    try:
        ties_merge(experts[0], experts, [0.2] * NUM_TASKS, **options)
    finally:
        ties_one_read.ONE_READ_FROM = before


def narrowed() -> dict[str, dict[str, Any]]:
    """By masks, random numbers and limits, and rounded once."""
    mergekit = {"weights": [0.3] * NUM_TASKS, "semantics": "mergekit"}
    unelected = {"semantics": "exact", "elect": "none"}
    drawn = {"keep_density": [0.5] * NUM_TASKS}
    factors = torch.ones(1, NUM_TASKS, dtype=torch.float64)
    return {
        "given masks": {**mergekit, "rescale": True, "keep": [torch.zeros(NUM_TASKS, SIZE // 8, dtype=torch.uint8)]},
        "random masks": {**mergekit, **drawn},
        "random masks, unelected": {**mergekit, **drawn, "elect": "none", "scales": factors},
        "upper limits": {**mergekit, "upper": torch.ones(NUM_TASKS), "rescale": True},
        "exact": {**mergekit, "semantics": "exact", "min_count": 2},
        "unique": {**unelected, "reduce": "unique", "unique_scales": factors},
        "magmax": {**unelected, "reduce": "magmax"},
    }


def merge(experts: list[torch.Tensor], options: dict[str, Any]) -> None:
    ties_merge_out([experts[0]], experts, [1.0] * NUM_TASKS, **options, out=[torch.empty_like(experts[0])])
