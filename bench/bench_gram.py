"""gram of one tensor, 8 experts and 2, against X X^T of the stacked task vectors in float64 and in float32.

Bound: base and experts are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import flat_inputs
from torch import Tensor

from surgery_kernels import gram

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {8: 4_000_000, 2: 16_000_000}  # parameters by the number of experts

pytestmark = [pytest.mark.parametrize("num_tasks", SIZES), pytest.mark.parametrize("dtype", DTYPES)]

Products = Callable[[Tensor, list[Tensor]], Tensor]


def eager(compute: torch.dtype) -> Products:
    def products(base: Tensor, experts: list[Tensor]) -> Tensor:
        task_vectors = torch.stack(experts).to(compute) - base.to(compute)
        return task_vectors @ task_vectors.T

    return products


def compiled(compute: torch.dtype) -> Products:
    torch.compiler.reset()
    return torch.compile(eager(compute), dynamic=False)


BASELINES = {"eager": eager, "compiled": compiled}


def describe(num_tasks: int, dtype: str, contender: str, compute: torch.dtype = torch.float64) -> dict[str, Any]:
    few = "" if num_tasks == 8 else f" of {num_tasks} experts"
    narrow = " against float32" if compute == torch.float32 else ""
    return {
        "op": f"gram{few}{narrow}",
        "num_params": SIZES[num_tasks],
        "num_tasks": num_tasks,
        "dtype": dtype,
        "contender": contender,
        "least_bytes": (num_tasks + 1) * SIZES[num_tasks] * DTYPES[dtype].itemsize,
    }


def share(result: Tensor, expected: Tensor) -> float:
    """None differs by more than rounding: float32 sums of millions of squares are off in the third digit."""
    tolerance = 1e-2 if result.dtype == torch.float32 else 1e-6
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance * expected.max().item())
    return 0.0


@pytest.mark.parametrize("compute", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.benchmark(group="gram")
def test_baseline(
    measure: Measure, rounds: int, baseline: str, compute: torch.dtype, dtype: str, num_tasks: int
) -> None:
    base, experts = flat_inputs(SIZES[num_tasks], DTYPES[dtype], num_tasks=num_tasks)
    theirs = BASELINES[baseline](compute)
    expected = gram(base, experts)
    measure(
        lambda: theirs(base, experts),
        ours=lambda: gram(base, experts),
        check=lambda result: share(result, expected),
        rounds=rounds,
        extra=describe(num_tasks, dtype, baseline, compute),
    )


@pytest.mark.benchmark(group="gram")
def test_ours(measure: Measure, rounds: int, dtype: str, num_tasks: int) -> None:
    base, experts = flat_inputs(SIZES[num_tasks], DTYPES[dtype], num_tasks=num_tasks)
    expected = gram(base, experts)
    measure(
        lambda: gram(base, experts),
        check=lambda result: 1 - float(torch.equal(result, expected)),
        rounds=4 * rounds,
        extra=describe(num_tasks, dtype, "ours"),
    )
