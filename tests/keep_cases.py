"""What narrows a merge besides its limits, for the ops on the CPU and in Triton."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery_kernels.ops.masks import pack
from tests.cases import densities_of, generator


def exact_options() -> list[dict[str, Any]]:
    """As `merge_options`, of what is rounded once."""
    options: list[dict[str, Any]] = []
    for elect, weights, rescale in itertools.product(("sum", "count", "none"), (None, True), (False, True)):
        exact = {"semantics": "exact", "elect": elect, "weights": weights, "rescale": rescale}
        options += [{**exact, "reduce": "mean"}, {**exact, "reduce": "sum"}]
    for reduce in ("magmax", "unique"):
        options.append({"semantics": "exact", "elect": "none", "reduce": reduce})
    return options


def masks_of(num_tasks: int, shape: Sequence[int], share: float = 0.6) -> Tensor:
    return torch.rand(num_tasks, *shape, generator=generator("mask", num_tasks, tuple(shape))) < share


def factors_of(num_tasks: int) -> list[float]:
    return [[1.25, 0.3, -2.0, 1.0, 0.0][t % 5] for t in range(num_tasks)]


def sources(num_tasks: int, shape: Sequence[int]) -> list[dict[str, Any]]:
    """What may narrow a merge, one after the other and together, as `ties_merge` takes it."""
    numel = math.prod(shape)
    drawn = {"keep_density": densities_of(num_tasks), "seed": 2**63 + 5, "tensor_id": 7}
    limits = torch.tensor([[0.15, 4 / 64, 0.05, math.inf, 0.0][t % 5] for t in range(num_tasks)])
    return [
        {"keep": masks_of(num_tasks, shape)},
        {"keep": masks_of(1, shape)},
        drawn,
        {"upper": limits},
        {"min_count": min(2, num_tasks)},
        {
            **drawn,
            "keep": pack(masks_of(num_tasks, shape, 0.8)),
            "upper": limits.double(),
            "min_count": 1,
            "task_ids": [(numel * t) % 2**32 for t in range(num_tasks)],
        },
    ]


def as_reference(options: dict[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """The options of `ties_merge` as the oracle takes them: of a list of tensors."""
    options = dict(options)
    if "tensor_id" in options:
        options["tensor_ids"] = [options.pop("tensor_id")]
    if (keep := options.get("keep")) is not None:
        if keep.dtype == torch.uint8:
            keep = (keep[:, torch.arange(math.prod(shape)) // 8] >> torch.arange(math.prod(shape)) % 8 & 1).bool()
        options["keep"] = [keep]
    for factors in ("scales", "unique_scales"):
        if factors in options:
            options[factors] = torch.tensor([options[factors]], dtype=torch.float64)
    return options
