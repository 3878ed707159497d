"""surgery_adapter, forward and backward, against the published formula site by site, batched, compiled, and the bound.

12 sites of ViT-B/32, each 16 images of 50 tokens of its own adapter. Bound: the FLOPs of the products, 4 forward and 8
backward for each row, rank and dim, at the rate of a large float32 product in the same run; beside it the bytes that
cannot be avoided: features and gradient read, features read again, corrected features and gradient written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure, seconds
from torch import Tensor

from surgery_kernels import surgery_adapter

SITES, ROWS, DIM = 12, 16 * 50, 768
RANKS = [16, 64]

Leaves = tuple[Tensor, Tensor, Tensor]
Correct = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], list[Tensor]]

pytestmark = pytest.mark.parametrize("rank", RANKS)


def formula(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return features - torch.relu(features @ down.mT) @ up.mT


def compiled_formula() -> Correct:
    torch.compiler.reset()
    return torch.compile(formula, dynamic=False)


def problem(rank: int) -> tuple[Leaves, Tensor]:
    """The leaves and the incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    features, grad = (torch.randn(SITES, ROWS, DIM, generator=generator) for _ in range(2))
    down = torch.randn(SITES, rank, DIM, generator=generator) / DIM**0.5
    up = torch.randn(SITES, DIM, rank, generator=generator) / rank**0.5
    return (features.requires_grad_(), down.requires_grad_(), up.requires_grad_()), grad


def batched_step(correct: Correct, leaves: Leaves, grad: Tensor) -> Step:
    """Corrected features and the gradients of the leaves."""

    def step() -> list[Tensor]:
        corrected = correct(*leaves)
        return [corrected.detach(), *torch.autograd.grad(corrected, leaves, grad)]

    return step


def step_by_site(leaves: Leaves, grad: Tensor) -> Step:
    """As the published code does it: every site is a module and a graph of its own. Corrected features, then gradients
    site after site; nothing is stacked, before or after."""
    sites = [tuple(x.detach().requires_grad_() for x in site) for site in zip(*leaves, strict=True)]
    grads, flat = grad.unbind(), [x for site in sites for x in site]

    def step() -> list[Tensor]:
        corrected = [formula(*site) for site in sites]
        return [*(x.detach() for x in corrected), *torch.autograd.grad(corrected, flat, grads)]

    return step


BASELINES: dict[str, Callable[[Leaves, Tensor], Step]] = {
    "eager": step_by_site,
    "batched": lambda leaves, grad: batched_step(formula, leaves, grad),
    "compiled": lambda leaves, grad: batched_step(compiled_formula(), leaves, grad),
}


def stacked(results: list[Tensor]) -> list[Tensor]:
    """The results of `step_by_site` as those of `batched_step`."""
    if len(results) == 4:
        return results
    corrected, gradients = results[:SITES], results[SITES:]
    return [torch.stack(corrected), *(torch.stack(gradients[i::3]) for i in range(3))]


def differing_share(results: list[Tensor], expected: list[Tensor]) -> float:
    """Sums of up to 800 products in another order; raises where more than that differs."""
    for result, other in zip(stacked(results), expected, strict=True):
        assert (result - other).norm() <= 1e-5 * other.norm()
    return 0.0


class Products:
    """The rate of a large float32 product at this moment, in FLOPs a second."""

    def __init__(self) -> None:
        self.factor = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))

    def rate(self) -> float:
        return 2 * 2048**3 / min(seconds(lambda: self.factor @ self.factor) for _ in range(3))


def describe(rank: int, contender: str) -> dict[str, Any]:
    return {
        "op": "surgery_adapter",
        "shape": (SITES, ROWS, DIM),
        "rank": rank,
        "num_params": SITES * ROWS * DIM,
        "num_tasks": SITES,
        "dtype": "fp32",
        "contender": contender,
        "semantics": "paper",
        "least_bytes": 5 * SITES * ROWS * DIM * 4,
        "flops": 12 * SITES * ROWS * DIM * rank,
    }


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.benchmark(group="surgery_adapter")
def test_baseline(measure: Measure, rounds: int, baseline: str, rank: int) -> None:
    leaves, grad = problem(rank)
    ours = batched_step(surgery_adapter, leaves, grad)
    measure(
        BASELINES[baseline](leaves, grad),
        ours=ours,
        check=lambda results: differing_share(results, ours()),
        rounds=2 * rounds,
        extra=describe(rank, baseline),
    )


@pytest.mark.benchmark(group="surgery_adapter")
def test_ours(measure: Measure, rounds: int, rank: int) -> None:
    leaves, grad = problem(rank)
    expected = batched_step(formula, leaves, grad)()
    products = Products()
    before = products.rate()
    measure(
        batched_step(surgery_adapter, leaves, grad),
        check=lambda results: differing_share(results, expected),
        rounds=4 * rounds,
        extra=describe(rank, "ours"),
    )
    info = measure.benchmark.extra_info
    info["matmul_flops_per_second"] = statistics.mean((before, products.rate()))
    info["flops_per_second"] = info["flops"] / measure.benchmark.stats.stats.median
    info["share_of_matmul"] = info["flops_per_second"] / info["matmul_flops_per_second"]
