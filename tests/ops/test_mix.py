"""linear_merge_out, the op behind averaging and task arithmetic, against the oracle."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, reference
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SHAPES,
    assert_same,
    bits,
    gaussian,
    grid,
    inputs,
    option_id,
    weights_of,
)

linear_merge_out = torch.ops.surgery_kernels.linear_merge_out


def merge(base: Tensor | None, experts: list[Tensor], *, weights: list[float], **options: Any) -> Tensor:
    out = torch.full_like(experts[0], math.nan, memory_format=torch.contiguous_format)
    linear_merge_out([] if base is None else [base], experts, weights, **options, out=[out])
    return out


def check(base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    expected = reference.linear_merge(base, experts, **options)
    assert_same(merge(base, experts, **options), expected, str(options))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, 257, 4, dtype)
    for lam, divisor in ((1.0, 1.0), (0.3, 1.0), (-0.7, 3.0)):
        check(base, experts, weights=weights_of(4), lam=lam, divisor=divisor)
        check(None, experts, weights=weights_of(4), lam=lam, divisor=divisor)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    check(base, experts, weights=[1.0] * 3, lam=0.3)
    check(None, experts, weights=[1.0] * 3, divisor=3.0)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 300, num_tasks, dtype)
        check(base, experts, weights=weights_of(num_tasks), lam=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_layouts_and_large_tensors(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, (301, 333), 3, dtype)
    expected = reference.linear_merge(base, experts, weights=[0.3] * 3)
    assert_same(merge(base, experts, weights=[0.3] * 3), expected)
    moved = [x.t().contiguous().t() for x in (base, *experts)]
    assert_same(merge(moved[0], moved[1:], weights=[0.3] * 3), expected)
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (base, *experts)]
    assert_same(merge(shifted[0], shifted[1:], weights=[0.3] * 3), expected)


def test_nonfinite_values() -> None:
    base, experts = inputs(grid, 100, 2, torch.float32)
    experts[1][[3, 5]] = torch.tensor([math.nan, math.inf])
    for nonfinite in ("drop", "propagate"):
        check(base, experts, weights=[1.0, 0.5], nonfinite=nonfinite)
        check(None, experts, weights=[1.0, 0.5], nonfinite=nonfinite)
    message = "experts[1] must be finite, got 2 NaN or infinite values"
    out = torch.full((100,), 7.0)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        linear_merge_out([base], experts, [1.0, 0.5], out=[out])
    assert (out == 7).all()


def test_refused() -> None:
    base, experts = inputs(grid, 100, 2, torch.float32)
    with pytest.raises(RuntimeError, match=r"^out must be apart from every input, got memory that overlaps one$"):
        linear_merge_out([base], experts, [1.0, 0.5], out=[base])
    with pytest.raises(RuntimeError, match=r"^experts must be .*, got 2 for 3"):
        linear_merge_out([base], experts, [1.0, 0.5, 1.0], out=[torch.zeros(100)])


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
def test_determinism() -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 50_001, 5, dtype)
        results = []
        for isa in _C.isas():
            for threads in (1, 2, 3, 7):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                results.append(bits(merge(base, experts, weights=weights_of(5), lam=0.3)))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.any_isa
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
def test_opcheck(with_base: bool) -> None:
    bases, experts = [], []
    for count in (100, 33):
        base, of_tensor = inputs(gaussian, count, 2, torch.float32)
        bases.append(base)
        experts += of_tensor
    out = [torch.zeros_like(base) for base in bases]
    options = {"lam": 0.3, "names": ["a", "b"], "out": out}
    torch.library.opcheck(linear_merge_out, (bases if with_base else [], experts, [1.0, 0.5]), options)
