"""combine, forward and backward, on the shapes of ViT-B/32, one coefficient for each of 8 experts and each tensor.

Against the sum that AdaMerging's users write: tensor by tensor, expert by expert, differentiated by autograd. Bound:
forward reads base and task vectors and writes the result, backward reads the incoming gradient and the task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs, num_params_of, state_dict, vit_b32_shapes
from torch import Tensor

from surgery_kernels import combine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL, WHOLE = 2, 12  # layers

Step = Callable[[], list[Tensor]]  # the merged parameters, in one tensor or in many, and at last the gradient


class Problem:
    """A merge in the middle of its training: what it reads, and the gradient that a model gave it."""

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        self.shapes = vit_b32_shapes(layers)
        self.num_params = num_params_of(self.shapes)
        generator = torch.Generator().manual_seed(1)
        self.base, self.grad = (
            torch.empty(self.num_params, dtype=dtype).normal_(0, 0.02, generator=generator) for _ in range(2)
        )
        _, self.task_vectors = flat_inputs(self.num_params, dtype, takes_base=False)
        self.coefficients = torch.rand(NUM_TASKS, len(self.shapes), generator=generator).requires_grad_()
        self.block_offsets = torch.tensor([0, *map(math.prod, self.shapes.values())]).cumsum(0)

    def describe(self, contender: str) -> dict[str, Any]:
        return {
            "op": "combine",
            "num_params": self.num_params,
            "num_tasks": NUM_TASKS,
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == self.base.dtype),
            "contender": contender,
            "semantics": "paper",
            "least_bytes": (2 * (NUM_TASKS + 1) + 1) * self.base.nbytes,
        }

    def ours(self) -> list[Tensor]:
        merged = combine(self.base, self.task_vectors, self.coefficients, self.block_offsets)
        return [merged, *torch.autograd.grad(merged, self.coefficients, self.grad)]

    def by_tensors(self, merge: Callable[..., list[Tensor]]) -> Step:
        base, grad, *task_vectors = (
            list(state_dict(flat, self.shapes).values()) for flat in (self.base, self.grad, *self.task_vectors)
        )

        def step() -> list[Tensor]:
            merged = merge(base, task_vectors, self.coefficients)
            return [*merged, *torch.autograd.grad(merged, self.coefficients, grad)]

        return step


def eager_merge(base: list[Tensor], task_vectors: list[list[Tensor]], coefficients: Tensor) -> list[Tensor]:
    merged = []
    for block, (start, *changes) in enumerate(zip(base, *task_vectors, strict=True)):
        column = coefficients[:, block]
        merged.append(start + sum(factor * change for factor, change in zip(column, changes, strict=True)))
    return merged


def compiled_merge() -> Callable[..., list[Tensor]]:
    torch.compiler.reset()
    return torch.compile(eager_merge, dynamic=False)


BASELINES = {"eager": lambda: eager_merge, "compiled": compiled_merge}


def differing_share(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The share of parameters that differ, by roundings alone: in bfloat16 eager rounds after every operation."""
    merged, gradients = torch.cat([x.flatten() for x in theirs[:-1]]), (theirs[-1], ours[-1])
    eps = torch.finfo(merged.dtype).eps
    assert (merged - ours[0]).abs().max() <= eps * ours[0].abs().max()
    # up to 2.4M products of random sign, in another order and precision
    assert (gradients[0] - gradients[1]).abs().max() <= eps**0.5 * gradients[1].abs().max()
    return (merged != ours[0]).float().mean().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("baseline", "layers"),
    [
        ("eager", SMALL),
        ("compiled", SMALL),
        ("eager", WHOLE),
        pytest.param("compiled", WHOLE, marks=pytest.mark.large),  # minutes to compile
    ],
)
@pytest.mark.benchmark(group="combine")
def test_baseline(measure: Measure, rounds: int, baseline: str, layers: int, dtype: str) -> None:
    problem = Problem(layers, DTYPES[dtype])
    theirs = problem.by_tensors(BASELINES[baseline]())
    expected = problem.ours()
    measure(
        theirs,
        ours=problem.ours,
        check=lambda result: differing_share(result, expected),
        rounds=1 if layers == WHOLE else rounds,
        warm_up=layers == SMALL or baseline == "compiled",
        extra=problem.describe(baseline),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [SMALL, WHOLE])
@pytest.mark.benchmark(group="combine")
def test_ours(measure: Measure, rounds: int, layers: int, dtype: str) -> None:
    problem = Problem(layers, DTYPES[dtype])
    expected = problem.ours()
    measure(
        problem.ours,
        check=lambda result: 1 - float(all(map(torch.equal, result, expected))),
        rounds=4 * rounds,
        extra=problem.describe("ours"),
    )
