"""combine with blocks that are parted at random into groups, against the oracle and one-hot masks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, combine, reference
from surgery_kernels.reference.combine import groups_of
from tests.cases import DTYPES, NUM_TASKS, assert_same, bits, gaussian, generator, inputs, option_id
from tests.ops.test_combine import compute_type, offsets_of, problem, uneven_blocks

pytestmark = pytest.mark.any_isa  # test_determinism compares them all


def coefficients_of(num_tasks: int, block_offsets: Tensor, groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (num_tasks, block_offsets.numel() - 1, groups)
    return torch.randn(shape, generator=generator(shape), dtype=torch.float64).to(dtype).requires_grad_()


def by_masks(base: Tensor, task_vectors: Tensor, coefficients: Tensor, block_offsets: Tensor, seed: int) -> Tensor:
    """A sum over one-hot masks, in float64, differentiable."""
    groups = groups_of(block_offsets, coefficients.shape[2], seed)
    masks = torch.nn.functional.one_hot(groups, coefficients.shape[2]).double()  # [num_params, num_groups]
    of_param = coefficients.double().repeat_interleave(block_offsets.diff(), dim=1)
    return base.double() + ((of_param * masks).sum(dim=2) * task_vectors.double()).sum(dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("num_params", [0, 1, 63, 65, 257, 40_001])
def test_every_size(num_params: int, dtype: torch.dtype) -> None:
    base, task_vectors = problem(num_params, 3, dtype)
    grad = inputs(gaussian, num_params, 1, dtype)[1][0]
    for block_offsets in (offsets_of(num_params), uneven_blocks(num_params)):
        for groups in (1, 2, 5, 16, 33, 256) if num_params < 1_000 else (10, 40):
            coefficients = coefficients_of(3, block_offsets, groups)
            merged = combine(base, task_vectors, coefficients, block_offsets, seed=groups)
            expected = reference.combine(base, task_vectors, coefficients, block_offsets, seed=groups)
            assert_same(merged, expected)
            (gradient,) = torch.autograd.grad(merged, coefficients, grad)
            sums = by_masks(base, task_vectors, coefficients, block_offsets, groups)
            (exact,) = torch.autograd.grad(sums, coefficients, grad.double())
            assert gradient.dtype == torch.float32
            eps = torch.finfo(compute_type(dtype)).eps
            scale = grad.double().norm() * task_vectors.double().norm() if num_params else 0.0
            torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=float(8 * eps * scale))


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_task_vectors(num_tasks: int) -> None:
    base, task_vectors = problem(1_300, num_tasks, torch.bfloat16)
    block_offsets = uneven_blocks(1_300)
    coefficients = coefficients_of(num_tasks, block_offsets, 7)
    merged = combine(base, list(task_vectors), coefficients, block_offsets)
    assert_same(merged, reference.combine(base, task_vectors, coefficients, block_offsets))


def test_one_group_is_no_group() -> None:
    base, task_vectors = problem(5_000, 3, torch.float32)
    block_offsets = uneven_blocks(5_000)
    coefficients = coefficients_of(3, block_offsets, 1)
    expected = combine(base, task_vectors, coefficients[..., 0], block_offsets)
    for seed in (0, -1, 2**64 - 1):
        assert_same(combine(base, task_vectors, coefficients, block_offsets, seed=seed), expected)


def test_groups_are_of_about_equal_size_and_of_their_block_alone() -> None:
    block_offsets = offsets_of(90_000, 30_000, 60_000)
    first, second, third = groups_of(block_offsets, 6, 11).split(30_000)
    for groups in (first, second, third):
        assert (groups.bincount() - 5_000).abs().max() < 5 * 5_000**0.5
    assert abs((first == second).double().mean() - 1 / 6) < 0.02
    assert torch.equal(groups_of(offsets_of(30_007, 7), 6, 11)[7:], second)  # not where the block lies
    assert not torch.equal(groups_of(offsets_of(30_000), 6, 12), first)


@pytest.mark.usefixtures("restored_isa", "restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_determinism(dtype: torch.dtype) -> None:
    num_params = 70_001
    base, task_vectors = problem(num_params, 5, dtype)
    grad = inputs(gaussian, num_params, 1, dtype)[1][0]
    block_offsets = offsets_of(num_params, 5, 773, 773, 60_017)
    coefficients = coefficients_of(5, block_offsets, 21)
    results = []
    for isa in _C.isas():
        _C.set_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            merged = combine(base, task_vectors, coefficients, block_offsets, seed=3)
            (gradient,) = torch.autograd.grad(merged, coefficients, grad)
            results.append((bits(merged.detach()), bits(gradient)))
    for of_merged, of_gradient in results:
        assert torch.equal(of_merged, results[0][0]) and torch.equal(of_gradient, results[0][1])


def double_problem() -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    base, task_vectors = problem(60, 3, torch.float64)
    block_offsets = offsets_of(60, 1, 1, 20)
    return base, list(task_vectors), coefficients_of(3, block_offsets, 4, torch.float64), block_offsets


def test_gradcheck() -> None:
    base, task_vectors, coefficients, block_offsets = double_problem()

    def merge(coefficients: Tensor) -> Tensor:
        return combine(base, task_vectors, coefficients, block_offsets, seed=4)

    assert torch.autograd.gradcheck(merge, coefficients)
    assert torch.autograd.gradgradcheck(lambda coefficients: merge(coefficients).sin(), coefficients)


def test_opcheck() -> None:
    base, task_vectors, coefficients, block_offsets = double_problem()
    ops = torch.ops.surgery_kernels
    torch.library.opcheck(ops.combine_grouped, (base, task_vectors, coefficients, block_offsets, 3))
    grad = base.clone().requires_grad_()
    torch.library.opcheck(ops.combine_grouped_backward, (grad, task_vectors, block_offsets, 4, 3))


def test_compiled() -> None:
    def loss(base: Tensor, task_vectors: Tensor, coefficients: Tensor, block_offsets: Tensor) -> Tensor:
        return combine(base, task_vectors, coefficients, block_offsets, seed=6).float().square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    base, task_vectors = problem(1_000, 3, torch.bfloat16)
    block_offsets = offsets_of(1_000, 10, 200)
    coefficients = coefficients_of(3, block_offsets, 5)
    results = []
    for call in (compiled, loss):
        value = call(base, task_vectors, coefficients, block_offsets)
        results.append((value, *torch.autograd.grad(value, coefficients)))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)


GOOD: dict[str, Any] = {
    "base": torch.zeros(4),
    "task_vectors": [torch.ones(4), torch.ones(4)],
    "coefficients": torch.ones(2, 3, 5),
    "block_offsets": torch.tensor([0, 1, 1, 4]),
}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("coefficients must have shape (2, 3), got (2, 4, 5)", {"coefficients": torch.ones(2, 4, 5)}),
        ("coefficients must be of 1 to 256 groups, got shape (2, 3, 0)", {"coefficients": torch.ones(2, 3, 0)}),
        ("coefficients must be of 1 to 256 groups, got shape (2, 3, 257)", {"coefficients": torch.ones(2, 3, 257)}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        combine(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (
            "coefficients must be [2, 3, groups] on the CPU, got another shape or device",
            {"coefficients": torch.ones(2, 3)},
        ),
        ("coefficients must be in the compute type, got another dtype", {"coefficients": torch.ones(2, 3, 5).double()}),
        ("coefficients must be of 1 to 256 groups of every block, got 257", {"coefficients": torch.ones(2, 3, 257)}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_refused_by_the_op_itself(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        torch.ops.surgery_kernels.combine_grouped(**{**GOOD, **changes}, seed=0)


def test_the_number_of_groups_of_a_gradient() -> None:
    with pytest.raises(RuntimeError, match=r"^coefficients must be of 1 to 256 groups of every block, got 0$"):
        torch.ops.surgery_kernels.combine_grouped_backward(torch.zeros(4), [torch.ones(4)], torch.tensor([0, 4]), 0, 1)
