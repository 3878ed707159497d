"""census on CUDA tensors: the Triton kernels against the CPU, to the bit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import DTYPES, KINDS, assert_same, gaussian, inputs, option_id
from tests.guards import guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

op = torch.ops.surgery_kernels.census


def check(gpu: torch.device, bases: list[Tensor], experts: list[Tensor], n: int, limits: Tensor | None = None) -> None:
    from surgery_kernels.triton.census import census

    found = census([guarded(x, gpu, 1) for x in bases], [guarded(x, gpu, 1) for x in experts], n, limits)
    for actual, expected in zip(found, op(bases, experts, n, limits), strict=True):
        assert_same(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(kind, (7, 41), 3, dtype)
    check(gpu, [base], experts, 3, torch.tensor([[0.0, 0.01, 0.5]], dtype=torch.float64))


def test_several_tensors(gpu: torch.device) -> None:
    """Of several sizes and dtypes: more than a block, none, one."""
    bases, experts = [], []
    for i, shape in enumerate([(33_000,), (0,), (5,), (), (3, 7, 5)]):
        base, of_tensor = inputs(gaussian, shape, 2, DTYPES[1 + i % 3])
        bases.append(base)
        experts += of_tensor
    check(gpu, bases, experts, 2, torch.rand(5, 2, dtype=torch.float64))
    check(gpu, bases, experts, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_odd_numbers(dtype: torch.dtype, gpu: torch.device) -> None:
    largest = torch.finfo(dtype).max
    base = torch.tensor([0.0, -0.0, 1, largest, torch.nan, torch.inf, 2, -largest], dtype=dtype)
    one = torch.tensor([1.0, 0, torch.nan, -largest, 1, torch.inf, 3, -largest], dtype=dtype)
    two = torch.tensor([-1.0, -0.0, 2, largest, 1, 1, 1, -torch.inf], dtype=dtype)
    check(gpu, [base], [one, two], 2, torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [torch.ones(2)], 1), "base must be one tensor for every merged tensor, got none"),
        (([torch.ones(2)], [torch.ones(2)], 0), "num_tasks must be 1 or more, got 0"),
        (([torch.ones(2)], [torch.ones(2)], 1, torch.ones(1)), "thresholds must be contiguous float64 [tensors"),
        (([torch.ones(2)], [torch.ones(2)], 1, -torch.ones(1).double()), "thresholds must be 0 or greater, got -1"),
    ],
    ids=str,
)
def test_errors(arguments: Any, message: str) -> None:
    from surgery_kernels.triton.census import census

    with pytest.raises(RuntimeError, match=re.escape(message)):
        census(*arguments)
