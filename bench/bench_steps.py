"""Steps of two tensors of 16M entries: those of NearSwap, rounded where eager PyTorch rounds; and a row's divergence.

Bound: both are read once, and the merged tensor is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import flat_inputs
from torch import Tensor

from surgery_kernels import Steps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE, ROW = 16 << 20, 2048
T = 0.0005

pytestmark = [
    pytest.mark.parametrize("op", ["steps", "steps with sums"]),
    pytest.mark.parametrize("dtype", DTYPES),
    pytest.mark.benchmark(group="steps"),
]

Call = Callable[[Tensor, Tensor], Tensor]


def nearswap(base: Tensor, other: Tensor) -> Tensor:
    weight = (T / (base - other).abs().clamp(min=1e-6)).clamp(min=0.0, max=1.0)
    return weight * other + (1 - weight) * base


def divergence(base: Tensor, other: Tensor) -> Tensor:
    p, q = other.double().exp(), base.double().exp()
    return (p * (p / q).log()).sum(dim=1)


EAGER = {"steps": nearswap, "steps with sums": divergence}


def ours(op: str, dtype: torch.dtype) -> Call:
    steps = Steps(2)
    base, other = steps.load(0), steps.load(1)
    if op == "steps":
        weight = (1.0 / abs(base - other).maximum(1e-6) * T).maximum(0.0).minimum(1.0)
        steps.store(weight * other + (1.0 - weight) * base)
        out = torch.empty(SIZE // ROW, ROW, dtype=dtype)

        def merge(base: Tensor, other: Tensor) -> Tensor:
            steps.run([base, other], out=[out])
            return out

        return merge
    with steps.exact():
        p, q = other.exp(), base.exp()
        steps.sum(p * (p / q).log())
    return lambda base, other: steps.run([base, other], axis="row", wide=True)[:, 0]


def two_tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    base, (other,) = flat_inputs(SIZE, dtype, num_tasks=1)
    assert base is not None
    return base.view(-1, ROW), other.view(-1, ROW)


def contender_of(contender: str, op: str, dtype: torch.dtype) -> Call:
    if contender == "ours":
        return ours(op, dtype)
    torch.compiler.reset()
    return EAGER[op] if contender == "eager" else torch.compile(EAGER[op], dynamic=False)


def describe(op: str, dtype: str, contender: str) -> dict[str, Any]:
    passes = 3 if op == "steps" else 2
    return {
        "op": op,
        "num_params": SIZE,
        "num_tasks": 1,
        "dtype": dtype,
        "contender": contender,
        "least_bytes": passes * SIZE * DTYPES[dtype].itemsize,
    }


@pytest.mark.parametrize("contender", ["eager", "compiled", "ours"])
def test_steps(measure: Measure, rounds: int, contender: str, dtype: str, op: str) -> None:
    base, other = two_tensors(DTYPES[dtype])
    call, fused = contender_of(contender, op, DTYPES[dtype]), ours(op, DTYPES[dtype])
    expected = EAGER[op](base, other)

    def check(result: Tensor) -> float:
        """Rounded steps are those of eager PyTorch; what is compiled rounds less often."""
        tolerance = 1e-2 if contender == "compiled" and dtype == "bf16" else 1e-6
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        return 0.0

    measure(
        lambda: call(base, other),
        ours=None if contender == "ours" else lambda: fused(base, other),
        check=check,
        rounds=rounds,
        extra=describe(op, dtype, contender),
    )
