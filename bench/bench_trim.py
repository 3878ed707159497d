"""trim_thresholds of one tensor, 8 experts, against kthvalue. Bound: base and experts are read once."""

from __future__ import annotations

import pytest
import torch
from baselines import DENSITY
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels import trim_thresholds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_PARAMS = 4_000_000


def eager_thresholds(base: Tensor, experts: list[Tensor]) -> Tensor:
    num_params = base.numel()
    magnitudes = (torch.stack(experts) - base).abs()
    return magnitudes.kthvalue(num_params - int(num_params * DENSITY), dim=1).values.float()


def describe(dtype: str, contender: str) -> dict[str, object]:
    return {
        "op": "trim_thresholds",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "semantics": "paper",
        "least_bytes": (NUM_TASKS + 1) * NUM_PARAMS * DTYPES[dtype].itemsize,
    }


def share(result: Tensor, expected: Tensor) -> float:
    assert torch.equal(result, expected)
    return 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="trim_thresholds")
def test_eager(measure: Measure, rounds: int, dtype: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    measure(
        lambda: eager_thresholds(base, experts),
        ours=lambda: trim_thresholds(base, experts, density=DENSITY),
        check=lambda result: share(result, trim_thresholds(base, experts, density=DENSITY)),
        rounds=rounds,
        extra=describe(dtype, "eager"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="trim_thresholds")
def test_ours(measure: Measure, rounds: int, dtype: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    expected = trim_thresholds(base, experts, density=DENSITY)
    measure(
        lambda: trim_thresholds(base, experts, density=DENSITY),
        check=lambda result: share(result, expected),
        rounds=4 * rounds,
        extra=describe(dtype, "ours"),
    )
