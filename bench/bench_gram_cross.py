"""gram_cross of one task's rows, 12,800 x 768 and x 3072, against `X.T @ X; X.T @ Y` of torch.

The widths are those of a ViT-B's features and of the inputs of its second MLP layer; y is 768 wide. Bound: the
multiplications, half of the square ones, at the rate of a large float32 product in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bench_surgery_adapter import Products
from conftest import Measure
from torch import Tensor

from surgery_kernels import gram_cross

ROWS, Y_DIM = 12_800, 768
WIDTHS = [768, 3072]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

pytestmark = [pytest.mark.parametrize("dim", WIDTHS), pytest.mark.parametrize("dtype", DTYPES)]

Statistics = Callable[[Tensor, Tensor], Sequence[Tensor]]


def formula(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    """In float32, as ours; torch would round the sums of 16-bit features to 16 bits."""
    x, y = x[0].float(), y[0].float()
    return x.T @ x, x.T @ y


def compiled() -> Statistics:
    torch.compiler.reset()
    return torch.compile(formula, dynamic=False)


BASELINES: dict[str, Callable[[], Statistics]] = {"eager": lambda: formula, "compiled": compiled}


def problem(dim: int, dtype: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, ROWS, width, generator=generator).to(DTYPES[dtype]) for width in (dim, Y_DIM))
    return x, y


def describe(dim: int, dtype: str, contender: str) -> dict[str, Any]:
    return {
        "op": f"gram_cross of width {dim}",
        "shape": (1, ROWS, dim),
        "num_params": ROWS * dim,
        "num_tasks": 1,
        "dtype": dtype,
        "contender": contender,
        "least_bytes": ROWS * (dim + Y_DIM) * DTYPES[dtype].itemsize + dim * (dim + Y_DIM) * 4,
        "flops": ROWS * dim * (dim + 2 * Y_DIM),
    }


def differing_share(results: Sequence[Tensor], x: Tensor, y: Tensor) -> float:
    """Sums of 12,800 products in another order; raises where more than that differs."""
    wide = x[0].double()
    for result, expected in zip(results, (wide.T @ wide, wide.T @ y[0].double()), strict=False):
        torch.testing.assert_close(result.double().view_as(expected), expected, rtol=0, atol=1e-5 * ROWS)
    return 0.0


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.benchmark(group="gram_cross")
def test_baseline(measure: Measure, rounds: int, baseline: str, dim: int, dtype: str) -> None:
    x, y = problem(dim, dtype)
    theirs = BASELINES[baseline]()
    measure(
        lambda: theirs(x, y),
        ours=lambda: gram_cross(x, y),
        check=lambda results: differing_share(results, x, y),
        rounds=rounds,
        extra=describe(dim, dtype, baseline),
    )


@pytest.mark.benchmark(group="gram_cross")
def test_ours(measure: Measure, rounds: int, dim: int, dtype: str) -> None:
    x, y = problem(dim, dtype)
    products = Products()
    before = products.rate()
    measure(
        lambda: gram_cross(x, y),
        check=lambda results: differing_share(results[:2], x, y),
        rounds=2 * rounds,
        extra=describe(dim, dtype, "ours"),
    )
    info = measure.benchmark.extra_info
    info["matmul_flops_per_second"] = statistics.mean((before, products.rate()))
    info["flops_per_second"] = info["flops"] / measure.benchmark.stats.stats.median
    info["share_of_matmul"] = info["flops_per_second"] / info["matmul_flops_per_second"]
