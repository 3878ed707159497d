"""combine, forward and backward, on the shapes of ViT-B/32 with one coefficient per expert and tensor, 8 experts.

Against the sum that AdaMerging's users write: tensor by tensor, expert by expert, differentiated by autograd. Bound:
forward reads base and task vectors and writes the result, backward reads the incoming gradient and the task vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Measure
from footprint import Peak
from inputs import NUM_TASKS, flat_inputs, num_params_of, state_dict, vit_b32_shapes
from torch import Tensor

from surgery_kernels import combine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = vit_b32_shapes()
NUM_PARAMS = num_params_of(SHAPES)

Step = Callable[[], list[Tensor]]  # the merged parameters, in one tensor or in many, and at last the gradient


@dataclass
class Problem:
    """A merge in the middle of its training: what it reads, and the gradient that a model gave it."""

    base: Tensor  # [num_params]
    task_vectors: list[Tensor]  # [num_tasks] of [num_params]
    grad: Tensor  # [num_params]
    coefficients: Tensor  # [num_tasks, num_blocks]
    block_offsets: Tensor  # [num_blocks + 1]

    @classmethod
    def make(cls, dtype: torch.dtype) -> Problem:
        _, (base, grad, *_) = flat_inputs(NUM_PARAMS, dtype, takes_base=False)
        base, grad = base.mul_(20), grad.mul(1)
        _, task_vectors = flat_inputs(NUM_PARAMS, dtype, takes_base=False)
        sizes = torch.tensor([0, *(num_params_of({name: shape}) for name, shape in SHAPES.items())])
        coefficients = torch.rand(NUM_TASKS, len(SHAPES), generator=torch.Generator().manual_seed(0))
        return cls(base, task_vectors, grad, coefficients.requires_grad_(), sizes.cumsum(0))

    def ours(self) -> list[Tensor]:
        merged = combine(self.base, self.task_vectors, self.coefficients, self.block_offsets)
        return [merged, *torch.autograd.grad(merged, self.coefficients, self.grad)]

    def by_tensors(self, merge: Callable[..., list[Tensor]]) -> Step:
        base, grad, *task_vectors = (
            list(state_dict(flat, SHAPES).values()) for flat in (self.base, self.grad, *self.task_vectors)
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


def describe(dtype: str, contender: str) -> dict[str, Any]:
    return {
        "op": "combine",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_TASKS,
        "dtype": dtype,
        "contender": contender,
        "semantics": "paper",
        "least_bytes": (2 * (NUM_TASKS + 1) + 1) * NUM_PARAMS * DTYPES[dtype].itemsize,
    }


def differing_share(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The share of parameters that differ, none by more than the roundings of every step in the stored dtype."""
    merged, gradients = torch.cat([x.flatten() for x in theirs[:-1]]), (theirs[-1], ours[-1])
    eps = torch.finfo(merged.dtype).eps
    assert (merged - ours[0]).abs().max() <= eps * ours[0].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 4 * eps * gradients[1].abs().max()
    return (merged != ours[0]).float().mean().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.benchmark(group="combine")
def test_baseline(measure: Measure, rounds: int, baseline: str, dtype: str) -> None:
    problem = Problem.make(DTYPES[dtype])
    theirs = problem.by_tensors(BASELINES[baseline]())
    extra = describe(dtype, baseline)
    expected = problem.ours()
    if baseline == "compiled":
        theirs()  # what compiles is no memory of the merge
    peak = Peak()

    def check(result: list[Tensor]) -> float:
        extra["peak_extra_bytes"] = peak.beyond(result)
        return differing_share(result, expected)

    measure(theirs, ours=problem.ours, check=check, rounds=rounds, extra=extra)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="combine")
def test_ours(measure: Measure, rounds: int, dtype: str) -> None:
    problem = Problem.make(DTYPES[dtype])
    extra = describe(dtype, "ours")
    expected = problem.ours()
    peak = Peak()

    def check(result: list[Tensor]) -> float:
        extra["peak_extra_bytes"] = peak.beyond(result)
        return 1 - float(all(torch.equal(x, y) for x, y in zip(result, expected, strict=True)))

    measure(problem.ours, check=check, rounds=2 * rounds, extra=extra)
