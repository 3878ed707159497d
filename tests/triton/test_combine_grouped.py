"""Merges of groups on CUDA tensors: forward with the bits of the CPU, gradients within the error of their sums."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.cases import DTYPES, assert_same, gaussian, inputs, option_id
from tests.guards import guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

_ops = torch.ops.surgery_kernels

BLOCKS = [[0, 0], [0, 1], [0, 7, 7, 300], [0, 16, 4_120]]


def check(
    gpu: torch.device, offsets: list[int], groups: int, dtype: torch.dtype, num_tasks: int, shift: int = 0
) -> None:
    from surgery_kernels.triton.combine_grouped import combine_grouped, combine_grouped_backward

    base, task_vectors = inputs(gaussian, offsets[-1], num_tasks, dtype)
    compute = torch.promote_types(dtype, torch.float32)
    drawn = torch.Generator().manual_seed(0)
    coefficients = torch.randn(num_tasks, len(offsets) - 1, groups, generator=drawn, dtype=compute)
    block_offsets = torch.tensor(offsets)
    moved = [guarded(x, gpu, shift) for x in (base, *task_vectors)]
    merged = combine_grouped(moved[0], moved[1:], coefficients.to(gpu), block_offsets.to(gpu), 5)
    assert_same(merged.cpu(), _ops.combine_grouped(base, task_vectors, coefficients, block_offsets, 5))
    gradient = combine_grouped_backward(moved[0], moved[1:], block_offsets.to(gpu), groups, 5).cpu()
    expected = _ops.combine_grouped_backward(base, task_vectors, block_offsets, groups, 5)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("offsets", BLOCKS, ids=str)
def test_against_the_cpu(offsets: list[int], dtype: torch.dtype, gpu: torch.device) -> None:
    for shift in (0, 1):
        check(gpu, offsets, 5, dtype, 3, shift)


@pytest.mark.parametrize(("num_tasks", "groups"), [(1, 1), (8, 32), (20, 10), (2, 256)])
def test_every_number_of_experts_and_groups(num_tasks: int, groups: int, gpu: torch.device) -> None:
    check(gpu, [0, 40, 700], groups, torch.float32, num_tasks)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (torch.zeros(1, 2), "coefficients must be [1, 2, groups] on "),
        (torch.zeros(1, 3, 4), "coefficients must be [1, 2, groups] on "),
        (torch.zeros(1, 2, 0), "coefficients must be of 1 to 256 groups of every block, got 0"),
        (torch.zeros(1, 2, 3).double(), "coefficients must be in the compute type, got another dtype"),
    ],
    ids=str,
)
def test_refused(coefficients: Any, message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.combine_grouped import combine_grouped, combine_grouped_backward

    x, block_offsets = torch.zeros(10, device=gpu), torch.tensor([0, 5, 10], device=gpu)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        combine_grouped(x, [x], coefficients.to(gpu), block_offsets, 0)
    with pytest.raises(RuntimeError, match=r"^coefficients must be of 1 to 256 groups of every block, got 257$"):
        combine_grouped_backward(x, [x], block_offsets, 257, 0)
