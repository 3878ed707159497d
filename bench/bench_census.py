"""census of one tensor and 8 experts, against the same counts in eager PyTorch.

Bound: base and experts are read once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import flat_inputs
from torch import Tensor

from surgery_kernels import reference
from surgery_kernels.ops.census import Census, census

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_PARAMS, NUM_TASKS = 4_000_000, 8

pytestmark = pytest.mark.parametrize("dtype", DTYPES)


def describe(dtype: str, contender: str) -> dict[str, Any]:
    return {
        "op": "census",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "least_bytes": (NUM_TASKS + 1) * NUM_PARAMS * DTYPES[dtype].itemsize,
    }


def eager(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    """Changes and conflicts, of all and of every pair, and the masses: a part of what the op counts."""
    changes = torch.stack(experts).float() - base.float()
    up, down = changes > 0, changes < 0
    moved = up | down
    pairs = up.float() @ down.float().T
    return [
        moved.sum(-1),
        (up.any(0) & down.any(0)).sum(),
        (pairs + pairs.T).round().long(),
        changes.abs().sum(-1, dtype=torch.float64),
    ]


def share(result: list[Tensor], expected: Census) -> float:
    torch.testing.assert_close(result[3], expected.mass, rtol=1e-5, atol=0)
    assert torch.equal(result[0], expected.changed) and result[1] == expected.conflicts
    return 0.0


@pytest.mark.benchmark(group="census")
def test_eager(measure: Measure, rounds: int, dtype: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype], num_tasks=NUM_TASKS)
    expected = census(base, experts)
    measure(
        lambda: eager(base, experts),
        ours=lambda: census(base, experts),
        check=lambda result: share(result, expected),
        rounds=rounds,
        extra=describe(dtype, "eager"),
    )


@pytest.mark.benchmark(group="census")
def test_ours(measure: Measure, rounds: int, dtype: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype], num_tasks=NUM_TASKS)
    expected = reference.census(base, experts)
    measure(
        lambda: census(base, experts),
        check=lambda result: 1 - float(all(torch.equal(x, expected[name]) for name, x in vars(result).items())),
        rounds=4 * rounds,
        extra=describe(dtype, "ours"),
    )
