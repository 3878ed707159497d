"""Merges of one tensor, 8 experts, whose entries are kept at random (DARE) or by what the others hold (MagMax).

DARE against the formula and against mergekit, which scales what is kept back to its L1 norm: for that ours reads twice.
Bound: base and experts are read once and the result is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels import ties_merge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = ["DARE", "MagMax"]
NUM_PARAMS = 4_000_000
DENSITY = 0.3

Merge = Callable[[Tensor, list[Tensor]], Tensor]


def eager_dare(base: Tensor, experts: list[Tensor]) -> Tensor:
    total = torch.zeros_like(base)
    for expert in experts:
        mask = torch.rand(base.shape) < DENSITY
        total += (expert - base) * mask / DENSITY
    return base + total


def eager_magmax(base: Tensor, experts: list[Tensor]) -> Tensor:
    merged = torch.zeros_like(base)
    for expert in experts:
        task_vector = expert - base
        merged = torch.where(task_vector.abs() >= merged.abs(), task_vector, merged)
    return base + merged


def mergekit_dare(base: Tensor, experts: list[Tensor]) -> Tensor:
    from mergekit.merge_methods import get
    from mergekit.merge_methods.base import TensorGroup

    numbers = range(1, NUM_TASKS + 1)
    return get("dare_linear").merge_group(
        TensorGroup.from_tensors([base, *experts], base_index=0),
        **{"density": dict.fromkeys(numbers, DENSITY), "weight": dict.fromkeys(numbers, 1.0), "lambda": 1.0},
        **{"normalize": False, "rescale": True, "int8_mask": False},
    )


def theirs(contender: str, case: str) -> Merge:
    if contender == "mergekit":
        if case == "MagMax":
            pytest.skip("mergekit has no MagMax")
        pytest.importorskip("mergekit.merge_methods")
        return mergekit_dare
    eager = {"DARE": eager_dare, "MagMax": eager_magmax}[case]
    if contender == "eager":
        return eager
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


def ours(case: str, semantics: str) -> Merge:
    if case == "MagMax":
        options: dict[str, Any] = {"semantics": "exact", "reduce": "magmax"}
    elif semantics == "mergekit":
        options = {"semantics": "mergekit", "reduce": "sum", "keep_density": DENSITY, "rescale": True}
    else:
        options = {"semantics": "exact", "reduce": "sum", "keep_density": DENSITY, "scales": 1 / DENSITY}
    options |= {"elect": "none", "density": 1.0, "nonfinite": "propagate"}
    return lambda base, experts: ties_merge(base, experts, **options)


def describe(case: str, dtype: str, contender: str, semantics: str) -> dict[str, Any]:
    return {
        "op": f"ties_merge {case}",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "semantics": semantics,
        "least_bytes": (NUM_TASKS + 2) * NUM_PARAMS * DTYPES[dtype].itemsize,
    }


def check_against(mine: Merge, base: Tensor, experts: list[Tensor], case: str) -> Callable[[Tensor], float]:
    """The share of MagMax that differs; random masks differ, but the change they make is as large."""

    def check(result: Tensor) -> float:
        expected = mine(base, experts)
        if case == "MagMax":
            return float((result != expected).float().mean())
        norms = [float((x.float() - base.float()).abs().sum()) for x in (result, expected)]
        assert abs(norms[0] / norms[1] - 1) < 0.02
        return 0.0

    return check


@pytest.mark.parametrize("contender", ["eager", "compiled", "mergekit"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="ties_merge")
def test_baseline(measure: Measure, rounds: int, dtype: str, case: str, contender: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    semantics = "mergekit" if contender == "mergekit" else "paper"
    merge, mine = theirs(contender, case), ours(case, semantics)
    measure(
        lambda: merge(base, experts),
        ours=lambda: mine(base, experts),
        check=check_against(mine, base, experts, case),
        rounds=rounds,
        extra=describe(case, dtype, contender, semantics),
    )


@pytest.mark.parametrize(("case", "semantics"), [("DARE", "paper"), ("DARE", "mergekit"), ("MagMax", "paper")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="ties_merge")
def test_ours(measure: Measure, rounds: int, dtype: str, case: str, semantics: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    mine = ours(case, semantics)
    measure(
        lambda: mine(base, experts),
        check=check_against(mine, base, experts, case),
        rounds=4 * rounds,
        extra=describe(case, dtype, "ours", semantics),
    )
