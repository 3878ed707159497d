"""weighted_merge of one tensor: Fisher merging of 8 experts, in float32 and with the Fisher information of float32 for
experts in bfloat16; and the two passes of PCB-Merging over scores.

Bound: experts and importance, or base and experts, are read once, and the result is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels import weighted_merge
from surgery_kernels.ops.weighted_merge import Scored

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_PARAMS, FLOOR = 4_000_000, 1e-6

Merge = Callable[[list[Tensor], list[Tensor]], Tensor]


def eager(experts: list[Tensor], importance: list[Tensor]) -> Tensor:
    mass = torch.stack(importance).clamp(min=FLOOR)
    merged = (mass * torch.stack(experts)).sum(0) / mass.sum(0)
    return merged.to(experts[0].dtype)


def fusion_bench(experts: list[Tensor], importance: list[Tensor]) -> Tensor:
    """It adds the floor."""
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    given = [{"w": x} for x in importance]
    merged = merging_with_fisher_weights({"w": experts}, given, torch.ones(NUM_TASKS), False, FLOOR)
    return merged["w"].to(experts[0].dtype)


def ours(experts: list[Tensor], importance: list[Tensor]) -> Tensor:
    return weighted_merge(None, experts, importance, floor=FLOOR)


def contender_of(name: str) -> Merge:
    if name == "fusion_bench":
        pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
        return fusion_bench
    torch.compiler.reset()
    return {"eager": eager, "compiled": torch.compile(eager, dynamic=False), "ours": ours}[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contender", ["eager", "compiled", "fusion_bench", "ours"])
@pytest.mark.benchmark(group="weighted_merge")
def test_fisher(measure: Measure, rounds: int, contender: str, dtype: str) -> None:
    _, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    generator = torch.Generator().manual_seed(1)
    importance = [torch.empty(NUM_PARAMS).normal_(generator=generator).square_() for _ in range(NUM_TASKS)]
    merge, expected = contender_of(contender), ours(experts, importance)

    def check(result: Tensor) -> float:
        torch.testing.assert_close(result, expected, rtol=2e-5 if dtype == "fp32" else 1e-2, atol=2e-5)
        return (result != expected).float().mean().item()

    measure(
        lambda: merge(experts, importance),
        ours=None if contender == "ours" else lambda: ours(experts, importance),
        check=check,
        rounds=2 * rounds,
        extra={
            **described("fisher", dtype, contender),
            "least_bytes": (NUM_TASKS + 1) * experts[0].nbytes + NUM_TASKS * importance[0].nbytes,
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", ["limits", "merge"])
@pytest.mark.benchmark(group="weighted_merge")
def test_scores(measure: Measure, rounds: int, step: str, dtype: str) -> None:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    assert base is not None
    scored, density, factors = Scored([base], experts, NUM_TASKS), [0.05] * NUM_TASKS, [1.0] * NUM_TASKS
    clipping, out = scored.clipping(0.01), [torch.empty_like(base)]
    limits = scored.limits(clipping, density, factors)

    def call() -> Any:
        if step == "limits":
            return scored.limits(clipping, density, factors)
        return scored.merge(clipping, limits, out)

    measure(
        call,
        check=lambda result: 0.0 if result is None else 1 - float(torch.equal(result, limits)),
        rounds=2 * rounds,
        extra={
            **described(f"scores {step}", dtype, "ours"),
            "least_bytes": (NUM_TASKS + 1 + (step == "merge")) * base.nbytes,
        },
    )


def described(what: str, dtype: str, contender: str) -> dict[str, Any]:
    return {
        "op": f"weighted_merge {what}",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "semantics": "paper",
    }
