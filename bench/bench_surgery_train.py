"""surgery_train: 8 tasks x 1000 steps in one call, against the loop of autograd and Adam, plain and with compiled loss.

The loops run fewer steps, and so does ours beside them; a row's `scale` times its seconds is the time of all steps, one
of which takes as long as the next. No bound is stated, for adapters, moments and batches stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Measure
from torch import Tensor

from surgery_kernels import surgery_train

NUM_TASKS, STEPS, BATCH, DIM, RANK, IMAGES = 8, 1000, 16, 512, 16, 400
FEWER = 25  # steps of the loops

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    features: list[Tensor]
    targets: list[Tensor]
    down: Tensor
    up: Tensor
    indices: Tensor


def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(IMAGES, DIM, generator=generator) for _ in range(NUM_TASKS)]
    targets = [x + 0.3 * torch.randn(IMAGES, DIM, generator=generator) for x in features]
    down = (2 * torch.rand(NUM_TASKS, RANK, DIM, generator=generator) - 1) / DIM**0.5
    indices = torch.randint(0, IMAGES, (STEPS, NUM_TASKS, BATCH), generator=generator)
    return Problem(features, targets, down, torch.zeros(NUM_TASKS, DIM, RANK), indices)


def ours(given: Problem, steps: int) -> list[Tensor]:
    """The losses, and the trained factors."""
    down, up = given.down.clone(), given.up.clone()
    moments = [torch.zeros(2, *x.shape) for x in (down, up)]
    losses = surgery_train(given.features, given.targets, down, up, *moments, given.indices[:steps])
    return [losses, down, up]


def loss_of(features: Tensor, targets: Tensor, down: Tensor, up: Tensor) -> Tensor:
    corrected = features - torch.relu(features @ down.T) @ up.T
    return (corrected - targets).abs().mean()


def compiled_loss() -> Loss:
    torch.compiler.reset()
    return torch.compile(loss_of, dynamic=False)


BASELINES: dict[str, Callable[[], Loss]] = {"eager": lambda: loss_of, "compiled": compiled_loss}


def loop(loss_function: Loss, given: Problem, steps: int) -> list[Tensor]:
    """As the published code does it: a module for each task, one optimizer, tasks in turn."""
    factors = [[x.clone().requires_grad_() for x in pair] for pair in zip(given.down, given.up, strict=True)]
    optimizer = torch.optim.Adam([x for pair in factors for x in pair], lr=1e-3)
    losses = torch.zeros(steps, NUM_TASKS)
    for step, batches in enumerate(given.indices[:steps]):
        for t, batch in enumerate(batches):
            loss = loss_function(given.features[t][batch], given.targets[t][batch], *factors[t])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step, t] = loss.detach()
    return [losses, *(torch.stack([x.detach() for x in group]) for group in zip(*factors, strict=True))]


def differing_share(results: list[Tensor], expected: list[Tensor]) -> float:
    """Where a gradient is next to nothing its rounding decides a step of Adam; raises where more than that differs."""
    for result, other in zip(results, expected, strict=True):
        assert (result - other).norm() <= 1e-3 * other.norm()
    return 0.0


def describe(contender: str, steps: int) -> dict[str, Any]:
    factors = 2 * NUM_TASKS * DIM * RANK
    return {
        "op": "surgery_train",
        "shape": (NUM_TASKS, STEPS, BATCH, DIM),
        "rank": RANK,
        "num_params": factors,
        "num_tasks": NUM_TASKS,
        "dtype": "fp32",
        "contender": contender,
        "semantics": "paper",
        "steps": steps,
        "scale": STEPS / steps,
        "flops": 10 * NUM_TASKS * steps * BATCH * DIM * RANK,
        "least_bytes": 4 * (2 * NUM_TASKS * IMAGES * DIM + 6 * factors),
    }


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.benchmark(group="surgery_train")
def test_baseline(measure: Measure, rounds: int, baseline: str) -> None:
    given = problem()
    loss_function = BASELINES[baseline]()
    measure(
        lambda: loop(loss_function, given, FEWER),
        ours=lambda: ours(given, FEWER),
        check=lambda results: differing_share(results, ours(given, FEWER)),
        rounds=rounds,
        small=True,
        extra=describe(baseline, FEWER),
    )


@pytest.mark.benchmark(group="surgery_train")
def test_ours(measure: Measure, rounds: int) -> None:
    given = problem()
    expected = loop(loss_of, given, FEWER)
    measure(
        lambda: ours(given, STEPS),
        check=lambda results: differing_share([results[0][:FEWER]], expected[:1]),
        rounds=4 * rounds,
        small=True,
        extra=describe("ours", STEPS),
    )
    info = measure.benchmark.extra_info
    info["flops_per_second"] = info["flops"] / measure.benchmark.stats.stats.median
