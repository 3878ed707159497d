"""representation_loss, forward and backward, against the formula in PyTorch, plain and compiled, and the bound.

Bound: features and targets are read once and the gradient is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from torch import Tensor

from surgery_kernels import representation_loss

# [tasks, images, dim] of one step; [tasks, sites, images, dim] of SurgeryV2's token means; every token of ViT-B/16
SHAPES = {"step": (8, 16, 512), "sites": (8, 13, 16, 768), "tokens": (8, 64 * 197, 768)}
CACHED = ["step", "sites"]

Loss = Callable[[Tensor, Tensor], Tensor]
Result = tuple[Tensor, Tensor]

pytestmark = pytest.mark.parametrize("shape", SHAPES)


def eager_loss(features: Tensor, targets: Tensor) -> Tensor:
    return (features - targets).abs().mean(dim=(-2, -1))


def compiled_loss() -> Loss:
    torch.compiler.reset()
    return torch.compile(eager_loss, dynamic=False)


BASELINES: dict[str, Callable[[], Loss]] = {"eager": lambda: eager_loss, "compiled": compiled_loss}


def problem(shape: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features, targets = (torch.randn(SHAPES[shape], generator=generator) for _ in range(2))
    return features.requires_grad_(), targets


def step(loss_of: Loss, features: Tensor, targets: Tensor) -> Result:
    """The losses, and the gradient of their sum."""
    loss = loss_of(features, targets)
    return loss.detach(), torch.autograd.grad(loss.sum(), features)[0]


def differing_share(result: Result, expected: Result) -> float:
    torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=0)
    return float((result[1] != expected[1]).float().mean())


def describe(shape: str, contender: str) -> dict[str, Any]:
    numel = math.prod(SHAPES[shape])
    return {
        "op": "representation_loss",
        "shape": SHAPES[shape],
        "num_params": numel,
        "num_tasks": SHAPES[shape][0],
        "dtype": "fp32",
        "contender": contender,
        "semantics": "paper",
        "least_bytes": 3 * numel * 4,
    }


def rounds_of(shape: str, rounds: int) -> int:
    return rounds * {"step": 100, "sites": 20, "tokens": 1}[shape]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.benchmark(group="representation_loss")
def test_baseline(measure: Measure, rounds: int, baseline: str, shape: str) -> None:
    features, targets = problem(shape)
    loss_of = BASELINES[baseline]()
    measure(
        lambda: step(loss_of, features, targets),
        ours=lambda: step(representation_loss, features, targets),
        check=lambda result: differing_share(result, step(representation_loss, features, targets)),
        rounds=rounds_of(shape, rounds),
        small=shape in CACHED,
        extra=describe(shape, baseline),
    )


@pytest.mark.benchmark(group="representation_loss")
def test_ours(measure: Measure, rounds: int, shape: str) -> None:
    features, targets = problem(shape)
    expected = step(eager_loss, features, targets)
    measure(
        lambda: step(representation_loss, features, targets),
        check=lambda result: differing_share(result, expected),
        rounds=2 * rounds_of(shape, rounds),
        small=shape in CACHED,
        extra=describe(shape, "ours"),
    )
