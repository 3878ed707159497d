"""Masked merges on CUDA tensors: forward with the bits of the CPU, gradients within the error of their sums."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import DTYPES, assert_same, gaussian, inputs, option_id
from tests.guards import assert_border_kept, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

_ops = torch.ops.surgery_kernels

BLOCKS = [[0, 0], [0, 1], [0, 7, 7, 300], [0, 16, 4_120]]
DRAWS: list[tuple[float, int | None]] = [(0.5, 7), (1.0, 2), (0.7, -1), (0.0, 5), (0.5, None)]


def problem(offsets: list[int], dtype: torch.dtype, num_tasks: int = 3) -> tuple[Any, ...]:
    base, task_vectors = inputs(gaussian, offsets[-1], num_tasks, dtype)
    compute = torch.promote_types(dtype, torch.float32)
    drawn = torch.Generator().manual_seed(0)
    coefficients = torch.randn(num_tasks, len(offsets) - 1, generator=drawn, dtype=compute)
    logits = 2 * torch.randn(offsets[-1], generator=drawn, dtype=compute)
    return base, task_vectors, coefficients, torch.tensor(offsets), logits


def on(gpu: torch.device, first: Tensor, task_vectors: list[Tensor], *rest: Tensor, shift: int = 0) -> tuple[Any, ...]:
    moved = [guarded(x, gpu, shift) for x in (first, *task_vectors)]
    return moved[0], moved[1:], *(x.to(gpu) for x in rest)


def check(gpu: torch.device, given: tuple[Any, ...], temperature: float, seed: int | None, shift: int = 0) -> None:
    from surgery_kernels.triton.combine_masked import combine_masked, combine_masked_backward

    found = combine_masked(*on(gpu, *given, shift=shift), temperature, seed)
    merged, means = _ops.combine_masked(*given, temperature, seed)
    assert_same(found[0].cpu(), merged)
    assert_same(found[1].cpu(), means)
    grad = inputs(gaussian, given[0].numel(), 1, given[0].dtype)[1][0]
    given = (grad, *given[1:])
    moved = on(gpu, *given, shift=shift)
    gradients = combine_masked_backward(*moved, means.to(gpu), temperature, seed)
    for actual, expected in zip(gradients, _ops.combine_masked_backward(*given, means, temperature, seed), strict=True):
        assert actual.dtype == expected.dtype
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5 * largest)
    assert_border_kept(moved[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("offsets", BLOCKS, ids=str)
def test_against_the_cpu(offsets: list[int], dtype: torch.dtype, gpu: torch.device) -> None:
    given = problem(offsets, dtype)
    for temperature, seed in DRAWS if offsets[-1] < 1_000 else DRAWS[:1]:
        check(gpu, given, temperature, seed)


def test_unaligned_tensors_and_more_pieces_than_one(gpu: torch.device) -> None:
    check(gpu, problem([0, 3, 33_000], torch.float32, 1), 0.5, 1, shift=1)


@pytest.mark.parametrize("num_tasks", [1, 8, 33])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    check(gpu, problem([0, 20, 100], torch.float32, num_tasks), 0.5, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": torch.zeros(2, 2)}, "coefficients must be [1, 2] on "),
        ({"coefficients": torch.zeros(1, 2).double()}, "coefficients must be in the compute type, got another dtype"),
        ({"mask_logits": torch.zeros(9)}, "mask_logits must be [10] on "),
        ({"mask_logits": torch.zeros(10).double()}, "mask_logits must be in the compute type, got another dtype"),
        ({"temperature": -1.0}, "temperature must be finite and 0 or greater, got -1.0"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.combine_masked import combine_masked, combine_masked_backward

    x = torch.zeros(10, device=gpu)
    given = {
        "coefficients": torch.zeros(1, 2), "block_offsets": torch.tensor([0, 5, 10]), "mask_logits": torch.zeros(10),
    }  # fmt: skip
    given |= {name: value for name, value in change.items() if name in given}
    moved = [value.to(gpu) for value in given.values()]
    temperature = change.get("temperature", 0.5)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        combine_masked(x, [x], *moved, temperature, 0)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        combine_masked_backward(x, [x], *moved, torch.zeros(2, dtype=torch.float64, device=gpu), temperature, 0)


def test_means_of_another_shape(gpu: torch.device) -> None:
    from surgery_kernels.triton.combine_masked import combine_masked_backward

    x = torch.zeros(10, device=gpu)
    with pytest.raises(RuntimeError, match=r"^means must be float64 \[1\] on "):
        combine_masked_backward(
            x,
            [x],
            torch.zeros(1, 1, device=gpu),
            torch.tensor([0, 10], device=gpu),
            x,
            torch.zeros(1, device=gpu),
            0.5,
            0,
        )
