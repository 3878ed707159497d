"""combine on CUDA tensors: forward with the bits of the CPU, backward within its sums' error, the same each time."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import DTYPES, assert_same, bits, gaussian, inputs, large, option_id
from tests.guards import guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

BLOCKS = [
    [0, 0],
    [0, 1],
    [0, 65],
    [0, 7, 7, 300],
    [0, 4_096, 8_192],
    [0, 4_097, 13_000],
    [0, 0, 10, 4_096, 4_096, 8_500, 9_000, 9_000],
    [0, 1, 2, 3, 20_001],
]


def problem(offsets: list[int], num_tasks: int, dtype: torch.dtype, kind: Any = gaussian) -> tuple[Any, ...]:
    base, experts = inputs(kind, offsets[-1], num_tasks, dtype)
    compute = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(num_tasks, len(offsets) - 1, generator=generator, dtype=compute)
    return base, [(expert - base) for expert in experts], coefficients, torch.tensor(offsets)


def combined(gpu: torch.device, base: Tensor, task_vectors: list[Tensor], shift: int = 0, *rest: Tensor) -> Tensor:
    from surgery_kernels.triton.combine import combine

    moved = [guarded(x, gpu, shift) for x in (base, *task_vectors)]
    return combine(moved[0], moved[1:], *(x.to(gpu) for x in rest)).cpu()


def differentiated(gpu: torch.device, grad: Tensor, task_vectors: list[Tensor], offsets: Tensor) -> Tensor:
    from surgery_kernels.triton.combine import combine_backward

    moved = [guarded(x, gpu) for x in (grad, *task_vectors)]
    return combine_backward(moved[0], moved[1:], offsets.to(gpu)).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("offsets", BLOCKS, ids=str)
def test_forward(offsets: list[int], dtype: torch.dtype, gpu: torch.device) -> None:
    base, task_vectors, coefficients, block_offsets = problem(offsets, 3, dtype)
    for shift in (0, 1):
        merged = combined(gpu, base, task_vectors, shift, coefficients, block_offsets)
        assert_same(merged, reference.combine(base, torch.stack(task_vectors), coefficients, block_offsets))


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 20, 33])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, task_vectors, *rest = problem([0, 20, 100], num_tasks, dtype)
        expected = torch.ops.surgery_kernels.combine(base, task_vectors, *rest)
        assert torch.equal(bits(combined(gpu, base, task_vectors, 0, *rest)), bits(expected))


def test_what_is_not_finite_propagates(gpu: torch.device) -> None:
    base, task_vectors, coefficients, block_offsets = problem([0, 20, 300], 2, torch.bfloat16, large)
    coefficients[0, 1] = math.nan
    merged = combined(gpu, base, task_vectors, 0, coefficients, block_offsets)
    assert_same(merged, reference.combine(base, torch.stack(task_vectors), coefficients, block_offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("offsets", BLOCKS, ids=str)
def test_backward(offsets: list[int], dtype: torch.dtype, gpu: torch.device) -> None:
    grad, task_vectors, _, block_offsets = problem(offsets, 3, dtype)
    products = torch.stack(task_vectors).double() * grad.double()
    exact = torch.stack([x.sum(dim=1) for x in products.split(block_offsets.diff().tolist(), dim=1)], dim=1)
    size = torch.stack([x.abs().sum(dim=1) for x in products.split(block_offsets.diff().tolist(), dim=1)], dim=1)
    gradient = differentiated(gpu, grad, task_vectors, block_offsets)
    assert gradient.dtype == torch.promote_types(dtype, torch.float32)
    # a tree of 4096 products: 12 additions and the product, each off by half an eps at most
    assert ((gradient.double() - exact).abs() <= 7 * torch.finfo(gradient.dtype).eps * size).all()
    assert torch.equal(differentiated(gpu, grad, task_vectors, block_offsets), gradient)


def test_exact_sums_are_exact(gpu: torch.device) -> None:
    grad, *task_vectors = (torch.randint(-64, 65, (9_000,), dtype=torch.float32) / 64 for _ in range(4))
    block_offsets = torch.tensor([0, 100, 8_300, 9_000])
    expected = torch.ops.surgery_kernels.combine_backward(grad, task_vectors, block_offsets)
    assert_same(differentiated(gpu, grad, task_vectors, block_offsets), expected)


def test_layouts(gpu: torch.device) -> None:
    from surgery_kernels.triton.combine import combine

    base, task_vectors, coefficients, block_offsets = problem([0, 20, 100], 2, torch.float32)
    spread = [torch.stack([x, x], dim=1).to(gpu)[:, 0] for x in (base, *task_vectors)]
    merged = combine(spread[0], spread[1:], coefficients.t().contiguous().t().to(gpu), block_offsets.to(gpu))
    assert_same(merged.cpu(), reference.combine(base, torch.stack(task_vectors), coefficients, block_offsets))


@pytest.mark.parametrize(
    ("block_offsets", "message"),
    [
        ([1, 10], "block_offsets must start at 0, got 1"),
        ([0, 7, 5, 10], "block_offsets must not decrease, got 5 after 7"),
        ([0, 9], "block_offsets must end at the number of parameters, 10, got 9"),
    ],
    ids=str,
)
def test_offsets_out_of_order(block_offsets: list[int], message: str, gpu: torch.device) -> None:
    x = torch.zeros(10)
    coefficients = torch.zeros(1, len(block_offsets) - 1)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        combined(gpu, x, [x], 0, coefficients, torch.tensor(block_offsets))
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        differentiated(gpu, x, [x], torch.tensor(block_offsets))


def test_offsets_that_change_are_looked_at_again(gpu: torch.device) -> None:
    from surgery_kernels.triton.combine import combine

    x, block_offsets = torch.zeros(10, device=gpu), torch.tensor([0, 5, 10], device=gpu)
    coefficients = torch.zeros(1, 2, device=gpu)
    combine(x, [x], coefficients, block_offsets)
    block_offsets[1] = 11
    with pytest.raises(RuntimeError, match=r"^block_offsets must not decrease, got 10 after 11$"):
        combine(x, [x], coefficients, block_offsets)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^block_offsets must start at 0, got 1$"):
        combine(x, [x], coefficients, torch.tensor([1, 5, 10], device=gpu))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": torch.zeros(2, 2)}, "coefficients must be [1, 2] on "),
        ({"coefficients": torch.zeros(1, 2).double()}, "coefficients must be in the compute type, got another dtype"),
        (
            {"block_offsets": torch.tensor([0, 5, 10]).int()},
            "block_offsets must be int64 [num_blocks + 1], got another",
        ),
        ({"block_offsets": torch.tensor([[0, 5, 10]])}, "block_offsets must be int64 [num_blocks + 1], got another"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Tensor], message: str, gpu: torch.device) -> None:
    x = torch.zeros(10)
    given = {"coefficients": torch.zeros(1, 2), "block_offsets": torch.tensor([0, 5, 10]), **change}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        combined(gpu, x, [x], 0, *given.values())


def test_offsets_elsewhere(gpu: torch.device) -> None:
    from surgery_kernels.triton.combine import combine

    x = torch.zeros(10, device=gpu)
    with pytest.raises(RuntimeError, match=f"^block_offsets must be on {x.device}, got meta$"):
        combine(x, [x], torch.zeros(1, 1, device=gpu), torch.tensor([0, 10], device="meta"))
