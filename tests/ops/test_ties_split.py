"""ties_split against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference, ties_merge, ties_split
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SEMANTICS,
    SHAPES,
    assert_same,
    densities_of,
    equal,
    gaussian,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    option_id,
    rows,
    sparse,
    split_options,
    weights_of,
    with_weights,
)


def check(base: Tensor | None, experts: list[Tensor], what: str = "", **options: Any) -> None:
    expected = reference.ties_split(base, experts, **options)
    assert_same(ties_split(base, experts, **options), expected, f"{what} {options}")


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("options", split_options(), ids=option_id)
def test_every_option_on_every_kind_of_data(options: dict[str, Any], dtype: torch.dtype) -> None:
    for kind in KINDS:
        if options.get("rescale") and dtype == torch.float64 and kind not in (grid, sparse, equal):
            continue
        base, experts = inputs(kind, 257, 4, dtype)
        check(base, experts, kind.__name__, density=0.3, **with_weights(options, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(grid, shape, 3, dtype)
    for semantics in SEMANTICS:
        check(base, experts, semantics=semantics)
        check(None, experts, semantics=semantics)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 300, num_tasks, dtype)
        check(base, experts, density=densities_of(num_tasks))
        check(base, experts, weights=weights_of(num_tasks), semantics="peft", elect="count")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, rows, leaning_up, leaning_down], ids=option_id)
def test_large(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, 100_003, 3, dtype)
    for semantics in ("paper", "mergekit"):
        check(base, experts, semantics=semantics)


def test_layouts() -> None:
    base, experts = inputs(grid, (12, 21), 3, torch.float32)
    expected = reference.ties_split(base, experts)
    moved = [x.t().contiguous().t() for x in (base, *experts)]
    assert_same(ties_split(moved[0], moved[1:]), expected)
    assert_same(ties_split(base, torch.stack(experts)), expected)
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(12, 21) for x in (base, *experts)]
    assert_same(ties_split(shifted[0], shifted[1:]), expected)


@pytest.mark.parametrize(
    "options", [*({"semantics": s} for s in SEMANTICS), {"semantics": "mergekit", "elect": "none"}], ids=option_id
)
def test_the_parts_add_up_to_the_merge(options: dict[str, Any]) -> None:
    base, experts = inputs(gaussian, 20_001, 3, torch.float32)
    total = torch.zeros_like(base)
    for part in ties_split(base, experts, **options):
        total = total + part
    assert_same(base + total, ties_merge(base, experts, **options, reduce="sum"))


def test_given_thresholds() -> None:
    base, experts = inputs(grid, 5_000, 3, torch.float16)
    for semantics in SEMANTICS:
        check(base, experts, semantics=semantics, thresholds=torch.tensor([3 / 64, 0.0, math.inf]))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_nonfinite_values(semantics: str) -> None:
    base, experts = inputs(grid, 1_000, 3, torch.float32)
    experts[0][[1, 10, 20]] = torch.tensor([math.nan, math.inf, -math.inf])
    experts[2][10] = -math.inf
    for nonfinite in ("drop", "propagate"):
        for elect in ("sum", "count"):
            check(base, experts, semantics=semantics, nonfinite=nonfinite, elect=elect)
