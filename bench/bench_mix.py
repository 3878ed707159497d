"""mix of one tensor: task arithmetic and mergekit's `linear` of 8 experts, and a curve of 5 points between two models.

Bound: base and experts are read once, every output is written once; nobody looks for NaN first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels import mix

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_PARAMS = 4_000_000
LAM = 0.3
WEIGHTS = [0.1 * (t + 1) for t in range(NUM_TASKS)]
POINTS = [i / 4 for i in range(5)]

Merge = Callable[[Tensor, list[Tensor]], list[Tensor]]


def eager_task_arithmetic(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    return [base + LAM * sum(expert - base for expert in experts)]


def eager_linear(_: Tensor, experts: list[Tensor]) -> list[Tensor]:
    total = sum(weight * expert.float() for weight, expert in zip(WEIGHTS, experts, strict=True))
    return [(total / sum(WEIGHTS)).to(experts[0].dtype)]


def eager_curve(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    return [torch.lerp(base, experts[0], point) for point in POINTS]


def mergekit_linear() -> Merge:
    from mergekit.merge_methods.api import merge_tensors

    parameters = {"weight": WEIGHTS, "normalize": True}
    return lambda _, experts: [merge_tensors(experts, "linear", parameters=parameters)]


def our_task_arithmetic(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    return mix(base, experts, [[LAM] * NUM_TASKS], nonfinite="propagate")


def our_linear(_: Tensor, experts: list[Tensor]) -> list[Tensor]:
    divisor = torch.tensor(WEIGHTS).sum().item()
    return mix(None, experts, [WEIGHTS], divisor=divisor, fused=True, nonfinite="propagate")


def our_curve(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    return mix(base, experts[:1], [[point] for point in POINTS], nonfinite="propagate")


EAGER = {"task_arithmetic": eager_task_arithmetic, "linear": eager_linear, "curve": eager_curve}
OURS = {"task_arithmetic": our_task_arithmetic, "linear": our_linear, "curve": our_curve}
TENSORS = {"task_arithmetic": NUM_TASKS + 2, "linear": NUM_TASKS + 1, "curve": 2 + len(POINTS)}  # read and written


def contender_of(name: str, kind: str) -> Merge:
    if name == "mergekit":
        return mergekit_linear()
    torch.compiler.reset()
    return torch.compile(EAGER[kind], dynamic=False) if name == "compiled" else EAGER[kind]


def describe(kind: str, dtype: str, contender: str) -> dict[str, Any]:
    return {
        "op": f"mix {kind}",
        "num_params": NUM_PARAMS,
        "num_tasks": 1 if kind == "curve" else NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "semantics": "paper",
        "least_bytes": TENSORS[kind] * NUM_PARAMS * DTYPES[dtype].itemsize,
    }


def differing_share(theirs: list[Tensor], ours: list[Tensor], experts: list[Tensor], exact: bool) -> float:
    """The share of entries that differ, by roundings alone: in bfloat16 eager rounds after every operation."""
    largest = max(expert.abs().max().item() for expert in experts)
    slack = 0.0 if exact else 4 * torch.finfo(experts[0].dtype).eps * largest
    for x, y in zip(theirs, ours, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=slack)
    return torch.stack([x != y for x, y in zip(theirs, ours, strict=True)]).float().mean().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "contender"),
    [(kind, contender) for kind in EAGER for contender in ("eager", "compiled")] + [("linear", "mergekit")],
)
@pytest.mark.benchmark(group="mix")
def test_baseline(measure: Measure, rounds: int, kind: str, contender: str, dtype: str) -> None:
    if contender == "mergekit":
        pytest.importorskip("mergekit")
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    theirs = contender_of(contender, kind)
    measure(
        lambda: theirs(base, experts),
        ours=lambda: OURS[kind](base, experts),
        check=lambda result: differing_share(result, OURS[kind](base, experts), experts, contender == "mergekit"),
        rounds=2 * rounds,
        extra=describe(kind, dtype, contender),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.benchmark(group="mix")
def test_ours(measure: Measure, rounds: int, kind: str, dtype: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    expected = OURS[kind](base, experts)
    measure(
        lambda: OURS[kind](base, experts),
        check=lambda result: 1 - float(all(map(torch.equal, result, expected))),
        rounds=8 * rounds,
        extra=describe(kind, dtype, "ours"),
    )
