"""combine with what is drawn at random, forward and backward: Concrete's mask, and aTLAS x K's groups.

8 experts of 4M entries, as matrices of a ViT's shapes, one coefficient for each expert and tensor (and group), against
the formulas that FusionBench and the authors of aTLAS run in eager PyTorch, and compiled: relaxed Bernoulli masks that
torch draws and autograd keeps, and one-hot masks of K groups held in half precision, 84 MB for K = 10.

Bound: what `bench_combine.py` counts, base, gradient and task vectors read and the result written; under a mask the
logits are read twice more and their gradient is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels import combine
from surgery_kernels.reference.combine import groups_of, mask_of

SHAPES = ((3072, 768), (768, 768), (768, 768), (768, 512), (50, 768), (768,))
SIZES = [math.prod(shape) for shape in SHAPES]
TEMPERATURE, GROUPS, SEED = 0.5, 10, 1

Parts = list[Tensor]


def concrete(base: Parts, task_vectors: list[Parts], coefficients: Tensor, logits: Parts) -> Parts:
    """FusionBench's: every expert's task vector times its coefficient times the mask over its mean."""
    merged = []
    for block, (start, of_block) in enumerate(zip(base, logits, strict=True)):
        mask = torch.distributions.RelaxedBernoulli(torch.tensor(TEMPERATURE), logits=of_block).rsample()
        mask = mask / mask.mean()
        for t, vectors in enumerate(task_vectors):
            start = start + vectors[block] * (coefficients[t, block] * mask)
        merged.append(start)
    return merged


def one_hot(base: Parts, task_vectors: list[Parts], coefficients: Tensor, masks: Parts) -> Parts:
    """The authors': a tensor of coefficients is the sum of the masks times theirs.  # masks: [GROUPS, num_params]"""
    merged = []
    for block, (start, of_block) in enumerate(zip(base, masks, strict=True)):
        for t, vectors in enumerate(task_vectors):
            start = start + (coefficients[t, block, :, None] * of_block).sum(dim=0) * vectors[block]
        merged.append(start)
    return merged


class Problem:
    """A merge in the middle of its training."""

    def __init__(self, kind: str) -> None:
        self.kind, size = kind, sum(SIZES)
        self.base, self.task_vectors = torch.randn(size) * 0.02, flat_inputs(size, torch.float32, takes_base=False)[1]
        self.grad = torch.randn(size)
        self.block_offsets = torch.tensor([0, *SIZES]).cumsum(0)
        shape = (NUM_TASKS, len(SIZES)) if kind == "masked" else (NUM_TASKS, len(SIZES), GROUPS)
        self.coefficients = torch.rand(shape).requires_grad_()
        self.logits = torch.randn(size).requires_grad_() if kind == "masked" else None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.coefficients] if self.logits is None else [self.coefficients, self.logits]

    def ours(self) -> list[Tensor]:
        merged = combine(
            self.base, self.task_vectors, self.coefficients, self.block_offsets, mask_logits=self.logits,
            temperature=TEMPERATURE, seed=SEED,
        )  # fmt: skip
        return [merged.detach(), *torch.autograd.grad(merged, self.leaves, self.grad)]

    def theirs(self, compiled: bool) -> Callable[[], list[Tensor]]:
        torch.compiler.reset()
        merge: Any = concrete if self.kind == "masked" else one_hot
        if compiled:
            merge = torch.compile(merge, dynamic=False)
        base, grad, *task_vectors = (list(x.split(SIZES)) for x in (self.base, self.grad, *self.task_vectors))
        if self.logits is None:
            groups = groups_of(self.block_offsets, GROUPS, SEED)
            masks = [torch.nn.functional.one_hot(x, GROUPS).T.half().contiguous() for x in groups.split(SIZES)]
            leaves = [self.coefficients]
        else:
            masks = [x.detach().clone().requires_grad_() for x in self.logits.split(SIZES)]
            leaves = [self.coefficients, *masks]

        def step() -> list[Tensor]:
            merged = merge(base, task_vectors, self.coefficients, masks)
            return [torch.cat([x.detach() for x in merged]), *torch.autograd.grad(merged, leaves, grad)]

        return step

    def differing_share(self, found: list[Tensor]) -> float:
        """Of parameters; torch draws another mask, whose merge is as far away as two draws are."""
        ours = self.ours()
        if self.kind == "grouped":
            assert (found[0] - ours[0]).abs().max() < 1e-5
            assert (found[1] - ours[1]).norm() < 1e-3 * ours[1].norm()
            return ((found[0] - ours[0]).abs() > 1e-6).float().mean().item()
        assert self.logits is not None
        mask = mask_of(self.logits.detach(), self.block_offsets, TEMPERATURE, SEED)
        assert 0.4 < mask.mean() < 0.6
        changes = [(x[0] - self.base).norm() for x in (found, ours)]
        assert abs(changes[0] / changes[1] - 1) < 0.01
        return 0.0


@pytest.mark.parametrize("contender", ["eager", "compiled", "ours"])
@pytest.mark.parametrize("kind", ["masked", "grouped"])
@pytest.mark.benchmark(group="combine")
def test_drawn(measure: Measure, rounds: int, kind: str, contender: str) -> None:
    problem = Problem(kind)
    call = problem.ours if contender == "ours" else problem.theirs(contender == "compiled")
    more = 3 * problem.base.nbytes if kind == "masked" else 0
    measure(
        call,
        ours=None if contender == "ours" else problem.ours,
        check=problem.differing_share,
        rounds=4 * rounds if contender == "ours" else rounds,
        extra={
            "op": "combine masked" if kind == "masked" else f"combine of {GROUPS} groups",
            "num_params": sum(SIZES),
            "num_tasks": NUM_TASKS,
            "dtype": "fp32",
            "contender": contender,
            "semantics": "paper",
            "least_bytes": (2 * (NUM_TASKS + 1) + 1) * problem.base.nbytes + more,
        },
    )
