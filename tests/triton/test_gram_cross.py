"""gram_cross as CUDA tensors get it, here and on a GPU, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from surgery_kernels.triton import gram_cross as module
from tests.cases import DTYPES, assert_same, option_id
from tests.ops.test_gram_cross import SHAPES, problem

pytestmark = pytest.mark.any_isa


def check(device: torch.device, x: Tensor, y: Tensor | None, weights: Tensor | None, **options: Any) -> None:
    dtype = torch.float64 if options.pop("wide", False) else None
    expected = reference.gram_cross(x, y, weights=weights, dtype=dtype, **options)
    wide = dtype is not None or x.dtype == torch.float64
    given = [None if z is None else z.to(device) for z in (x, y)]
    if weights is not None:
        weights = weights.to(device, torch.float64 if wide else torch.float32)
    for actual, wanted in zip(module.gram_cross(*given, weights, wide=wide, **options), expected, strict=True):
        if wanted is None:
            assert actual.shape[-1] == 0
        else:
            assert_same(actual.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 0, 3, 2), (0, 5, 3, 2)], ids=str)
def test_exact_sums(gpu: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, weights = problem(shape, dtype)
    for wide in (False, True):
        check(gpu, x, y, None, wide=wide)
        check(gpu, x, y, weights, wide=wide)
        check(gpu, x, None, weights, wide=wide)


def test_strips(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRIP", 32)
    x, y, weights = problem((2, 40, 129, 20))
    check(gpu, x, y, weights)
    check(gpu, x[0], y[0], weights[0], offsets=[0, 0, 7, 40])


def test_a_row_of_weight_zero_may_hold_anything(gpu: torch.device) -> None:
    x, y, weights = problem((2, 9, 5, 4))
    weights[:, 3] = 0
    x[0, 3], y[1, 3] = torch.nan, torch.inf
    check(gpu, x, y, weights)
