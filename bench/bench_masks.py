"""masks of one tensor of 2000 rows, 8 experts, against torch's random numbers and mergekit's sparsification.

All contenders draw a mask of every task vector and take its L1 norm before and after; mergekit applies it too. Bound:
base and experts are read once, by rank twice, and the bits are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels import masks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RULES: dict[str, dict[str, Any]] = {"random": {}, "della": {"rule": "della", "epsilon": 0.1}}
NUM_PARAMS, ROWS = 4_000_000, 2_000
DENSITY, EPSILON = 0.3, 0.1

Draw = Callable[[Tensor, list[Tensor]], Any]


def eager_random(base: Tensor, experts: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """[num_tasks] of kept entries and norms"""
    drawn = []
    for expert in experts:
        task_vector = expert - base
        mask = torch.rand(task_vector.shape) < DENSITY
        drawn.append((mask.sum(), task_vector.abs().sum(), (task_vector * mask).abs().sum()))
    return drawn


def eager_della(base: Tensor, experts: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    drawn = []
    for expert in experts:
        task_vector = expert - base
        ranks = task_vector.abs().argsort(dim=1).argsort(dim=1)
        probability = DENSITY - EPSILON + 2 * EPSILON * ranks / (ranks.shape[1] - 1)
        mask = torch.rand(task_vector.shape) < probability
        drawn.append((mask.sum(), task_vector.abs().sum(), (task_vector * mask).abs().sum()))
    return drawn


def mergekit(rule: str) -> Draw:
    sparsify = pytest.importorskip("mergekit.sparsify")
    method = {"random": "random", "della": "della_magprune"}[rule]

    def draw(base: Tensor, experts: list[Tensor]) -> list[tuple[Tensor]]:
        drawn = []
        for expert in experts:
            kept = sparsify.sparsify(
                expert - base,
                DENSITY,
                sparsify.SparsificationMethod(method),
                epsilon=EPSILON,
                rescale_norm=sparsify.RescaleNorm.l1,
            )
            drawn.append((kept.count_nonzero(),))
        return drawn

    return draw


def theirs(contender: str, rule: str) -> Draw:
    eager = {"random": eager_random, "della": eager_della}[rule]
    if contender == "mergekit":
        return mergekit(rule)
    if contender == "eager":
        return eager
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False)


def ours(rule: str) -> Draw:
    return lambda base, experts: masks(base, experts, density=DENSITY, **RULES[rule])[1]


def inputs(dtype: str) -> tuple[Tensor, list[Tensor]]:
    base, experts = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    return base.view(ROWS, -1), [expert.view(ROWS, -1) for expert in experts]


def describe(rule: str, dtype: str, contender: str) -> dict[str, Any]:
    reads = {"random": 1, "della": 2}[rule]
    return {
        "op": f"masks {rule}",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "semantics": "paper",
        "least_bytes": reads * (NUM_TASKS + 1) * NUM_PARAMS * DTYPES[dtype].itemsize + NUM_TASKS * NUM_PARAMS // 8,
    }


def check(drawn: list[tuple[Tensor, ...]] | Tensor) -> float:
    """The draws differ; the share kept does not, but for entries of bfloat16 that are zero."""
    for kept, *_ in drawn:
        assert abs(float(kept) / NUM_PARAMS - DENSITY) < 0.02
    return 0.0


@pytest.mark.parametrize("contender", ["eager", "compiled", "mergekit"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="masks")
def test_baseline(measure: Measure, rounds: int, dtype: str, rule: str, contender: str) -> None:
    base, experts = inputs(dtype)
    draw, mine = theirs(contender, rule), ours(rule)
    measure(
        lambda: draw(base, experts),
        ours=lambda: mine(base, experts),
        check=check,
        rounds=rounds,
        extra=describe(rule, dtype, contender),
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="masks")
def test_ours(measure: Measure, rounds: int, dtype: str, rule: str) -> None:
    base, experts = inputs(dtype)
    mine = ours(rule)
    measure(
        lambda: mine(base, experts),
        check=check,
        rounds=4 * rounds,
        extra=describe(rule, dtype, "ours"),
    )
