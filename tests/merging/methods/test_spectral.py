"""Spectral methods against plain singular value decompositions in float64, hand examples, and FusionBench."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from tests.cases import assert_same

pytestmark = pytest.mark.any_isa


def polar(x: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left @ right


def svd(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    return left[:, :k], values[:k], right[:k]


def tsv_m(vectors: list[Tensor]) -> Tensor:
    k = min(vectors[0].shape) // len(vectors)
    left, values, right = zip(*(svd(vector, k) for vector in vectors), strict=True)
    return polar(torch.cat(left, 1)) @ torch.diag(torch.cat(values)) @ polar(torch.cat(right))


def iso_c(vectors: list[Tensor]) -> Tensor:
    total = sum(vectors)
    return torch.linalg.svdvals(total).mean() * polar(total)


def iso_cts(vectors: list[Tensor], common: float = 0.8) -> Tensor:
    count, rank = len(vectors), min(vectors[0].shape)
    k = rank - round((rank - int(rank * common)) / count) * count
    left, values, right = svd(sum(vectors), k)
    parts = [svd(x - left @ left.T @ x, (rank - k) // count) for x in vectors]
    lefts = torch.cat([*(part[0] for part in parts), left], 1)
    rights = torch.cat([*(part[2] for part in parts), right])
    return torch.cat([*(part[1] for part in parts), values]).mean() * polar(lefts) @ polar(rights)


def wudi(vectors: list[Tensor], steps: int = 300) -> Tensor:
    """By autograd, expert after expert."""
    merged = sum(vectors).clone().requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(((merged - x) @ x.T).square().sum() / x.square().sum() for x in vectors).backward()
        optimizer.step()
    return merged.detach()


ORACLES: dict[str, Callable[..., Tensor]] = {"tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": iso_cts, "wudi": wudi}


def models(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, dtype=dtype, generator=generator)
    return base, [base + 0.1 * torch.randn(shape, dtype=dtype, generator=generator) for _ in range(count)]


def merged(base: Tensor | None, experts: list[Tensor], method: str, **options: Any) -> Tensor:
    given = None if base is None else {"w": base}
    return merge_state_dicts(given, [{"w": expert} for expert in experts], method=method, **options)["w"]


@pytest.mark.parametrize("shape", [(16, 16), (12, 30), (30, 12)], ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", ORACLES)
def test_formulas(method: str, count: int, shape: tuple[int, int]) -> None:
    base, experts = models(shape, count)
    expected = base + 0.7 * ORACLES[method]([expert - base for expert in experts])
    torch.testing.assert_close(merged(base, experts, method, lam=0.7), expected, rtol=1e-7, atol=1e-8)
    narrow = merged(base.float(), [expert.float() for expert in experts], method, lam=0.7)
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-4, atol=1e-4)


def test_cart() -> None:
    _, experts = models((12, 30), 3)
    mean = sum(experts) / 3
    expected = mean + sum(x * v @ y for x, v, y in (svd(expert - mean, 4) for expert in experts))
    torch.testing.assert_close(merged(None, experts, "cart", rank=0.34), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(merged(None, experts[:2], "cart"), (experts[0] + experts[1]) / 2, rtol=1e-8, atol=1e-9)


def diag(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


SLANTED = 3 * torch.tensor([[0.25, 0.75**0.5 / 2], [0.75**0.5 / 2, 0.75]], dtype=torch.float64)
EXAMPLES = [
    ("tsv_m", {}, [diag(3, 1), diag(1, 2)], [[3, 0], [0, 2]]),
    ("tsv_m", {}, [diag(2, 0), SLANTED], [[2.066987, 0.25], [0.25, 2.933013]]),
    ("iso_c", {}, [diag(3, 1), diag(1, 2)], [[3.5, 0], [0, 3.5]]),
    ("iso_c", {}, [torch.tensor([[3.0, 0, 0], [0, 1, 0]]).double()], [[2, 0, 0], [0, 2, 0]]),
    ("iso_c", {}, [diag(4, 0)], [[2, 0], [0, 0]]),
    ("iso_c", {"of_rank": True}, [diag(4, 0)], [[4, 0], [0, 0]]),
    ("iso_cts", {"common": 0.5}, [diag(5, 0, 3, 0), diag(0, 4, 0, 1)], diag(3.25, 3.25, 3.25, 3.25).tolist()),
    ("cart", {"rank": 0.5}, [diag(4, 0), diag(0, 2)], [[2, 0], [0, 1]]),
    ("wudi", {"steps": 1, "lr": 0.5}, [diag(2, 0), diag(0, 1)], [[2, 0], [0, 1]]),
]


@pytest.mark.parametrize(("method", "options", "vectors", "expected"), EXAMPLES)
def test_by_hand(method: str, options: dict[str, Any], vectors: list[Tensor], expected: list[list[float]]) -> None:
    base = None if method == "cart" else torch.zeros_like(vectors[0])
    actual = merged(base, vectors, method, **options)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_directions_that_coincide_count_once() -> None:
    """Half the rank of each of two equal experts: what both have, not twice as much."""
    base, (expert, *_) = models((6, 8), 1)
    left, values, right = svd(expert - base, 3)
    torch.testing.assert_close(
        merged(base, [expert, expert], "tsv_m"), base + left * values @ right, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("method", ["tsv_m", "wudi"])
def test_one_expert_is_the_result(method: str) -> None:
    base, experts = models((6, 8), 1)
    torch.testing.assert_close(merged(base, experts, method), experts[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["tsv_m", "iso_cts", "wudi"])
def test_more_experts_than_rank_and_unchanged_ones(method: str) -> None:
    base, experts = models((3, 5), 7)
    assert (merged(base, experts, method) - base).norm() > 0.1
    several = merged(base, [experts[0], base, experts[1], base], method)
    assert several.isfinite().all() and (several - base).norm() > 0.1


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi", "cart"])
def test_what_is_no_matrix_or_excluded_is_averaged(method: str) -> None:
    base, experts = models((4, 3, 2), 3)
    mean = sum(experts) / 3
    torch.testing.assert_close(merged(base, experts, method), mean)
    matrix = merged(base, experts, method, convolutions=True)
    assert not torch.allclose(matrix, mean, atol=1e-3)
    flat = merged(base.view(4, 6), [expert.view(4, 6) for expert in experts], method)
    assert_same(matrix.view(4, 6), flat)
    left_out = merged(base.view(4, 6), [expert.view(4, 6) for expert in experts], method, exclude=["x", "w*"])
    torch.testing.assert_close(left_out, mean.view(4, 6))
    with pytest.raises(TypeError, match=r"^exclude must be a sequence of patterns, got 'w'$"):
        merged(base, experts, method, exclude="w")


FUSION_BENCH = [
    ("iso_c", "isotropic_merging.iso_utils", "iso_c", {}),
    ("iso_cts", "isotropic_merging.iso_utils", "iso_cts", {"common_space_fraction": 0.8}),
    ("wudi", "wudi.wudi", "wudi_merging", {"iter_num": 300}),
]


@pytest.mark.parametrize(("method", "module", "function", "options"), FUSION_BENCH)
def test_against_fusion_bench(
    method: str, module: str, function: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    theirs = getattr(importlib.import_module(f"fusion_bench.method.{module}"), function)
    base, experts = models((12, 20), 3)
    expected = base + theirs([{"w": expert - base} for expert in experts], accelerator="cpu", **options)["w"].detach()
    torch.testing.assert_close(merged(base, experts, method), expected, rtol=1e-7, atol=1e-8)
    capsys.readouterr()  # it prints


def test_the_rate_bounds_how_far_wudi_goes() -> None:
    base, experts = models((12, 20), 3)
    total = sum(experts) - 2 * base
    for steps, lr in ((10, 1e-5), (10, 1e-3)):
        moved = (merged(base, experts, "wudi", steps=steps, lr=lr) - total).abs().max()
        assert 0.5 * steps * lr < moved < 1.01 * steps * lr


@pytest.mark.parametrize("method", ["iso_c", "wudi"])
def test_16_bits_are_summed_as_wide_ones(method: str) -> None:
    """And what is not finite is dropped from the sum in both."""
    base, experts = models((12, 20), 3)
    narrow = [tensor.bfloat16() for tensor in (base, *experts)]
    narrow[2][3, 4] = torch.inf
    wide = [tensor.float() for tensor in narrow]
    options = {"nonfinite": "drop"}
    expected = merged(wide[0], wide[1:], method, **options).bfloat16()
    assert_same(merged(narrow[0], narrow[1:], method, **options), expected)
