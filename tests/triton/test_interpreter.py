"""The repaired interpreter computes what a GPU computes: otherwise the tests of the kernels would prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="there is no Triton for this platform")
import triton.language as tl  # noqa: E402

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

SIZE = 256


@triton.jit
def _bfloat16(x, y, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    tl.store(out + lanes, a + b)
    tl.store(out + SIZE + lanes, a * b)
    tl.store(out + 2 * SIZE + lanes, tl.where(a > b, a, b))
    tl.store(out + 3 * SIZE + lanes, (a.to(tl.float32) / 3).to(tl.bfloat16))
    tl.store(out + 4 * SIZE + lanes, tl.abs(a))
    tl.store(out + 5 * SIZE + lanes, tl.minimum(a, b))


@triton.jit
def _float32(x, y, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    tl.store(out + lanes, a / b)
    tl.store(out + SIZE + lanes, tl.math.div_rn(a, b))
    tl.store(out + 2 * SIZE + lanes, tl.sqrt(b))
    tl.store(out + 3 * SIZE + lanes, tl.math.sqrt_rn(b))
    tl.store(out + 4 * SIZE + lanes, tl.maximum(a * 1e38 * 1e38 * 0, b))


def run(kernel: Any, x: Tensor, y: Tensor, results: int, gpu: torch.device) -> list[Tensor]:
    out = torch.empty(results, SIZE, dtype=x.dtype, device=gpu)
    kernel[(1,)](x.to(gpu), y.to(gpu), out, SIZE=SIZE)
    return list(out.cpu())


def test_bfloat16_is_computed_on_values_and_rounded_to_nearest(gpu: torch.device) -> None:
    x, y = torch.randn(2, SIZE).bfloat16()
    x[:3], y[:3] = torch.tensor([1.0, -0.0, 3e38]), torch.tensor([0.00390625, 0.0, 3e38])
    added, multiplied, larger, divided, absolute, smaller = run(_bfloat16, x, y, 6, gpu)
    assert torch.equal(added, x + y)
    assert torch.equal(multiplied, x * y)
    assert torch.equal(larger, torch.maximum(x, y))
    assert torch.equal(divided, (x.float() / 3).bfloat16())
    assert torch.equal(absolute, x.abs())
    assert torch.equal(smaller, torch.minimum(x, y))


def test_only_exact_division_and_roots_are_exact(gpu: torch.device) -> None:
    x, y = torch.randn(SIZE), torch.rand(SIZE) + 0.1
    divided, exactly_divided, root, exact_root, number = run(_float32, x, y, 5, gpu)
    assert torch.equal(exactly_divided, x / y)
    assert torch.equal(exact_root, y.double().sqrt().float())  # torch on the CPU is not exact
    assert not torch.equal(divided, x / y)
    torch.testing.assert_close(divided, x / y)
    torch.testing.assert_close(root, y.sqrt())
    assert torch.equal(number, y)  # not NaN
