"""LegoMerge of latents and of heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import merge_heads, merge_latents

pytestmark = pytest.mark.any_isa


def frequencies(count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 7, dtype=torch.complex128, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("rule", "expected"), [("paper", 1.0), ("published", 0.5)])
def test_equal_magnitudes(rule: str, expected: float) -> None:
    z = torch.polar(torch.ones(3), torch.tensor([0.1, 1.0, -2.0]))
    torch.testing.assert_close(merge_latents([z, z], rule=rule), expected * z)


def test_the_harmonic_mean_and_the_mean_phase() -> None:
    latents, weights = frequencies(3), [0.5, 0.3, 0.2]
    merged = merge_latents(latents, weights=[5, 3, 2])
    inverse = sum(w / z.abs() for w, z in zip(weights, latents, strict=True))
    torch.testing.assert_close(merged.abs(), 1 / inverse)
    sines, cosines = (
        sum(w * f(z.angle()) for w, z in zip(weights, latents, strict=True)) for f in (torch.sin, torch.cos)
    )
    torch.testing.assert_close(merged.angle(), torch.atan2(sines, cosines))


@pytest.mark.parametrize("a", [0.5, 0.8])
def test_the_published_rule(a: float) -> None:
    x, y = frequencies()
    m, n = x.abs(), y.abs()
    expected = torch.polar(2 * a * (1 - a) * m * n / (a * n + (1 - a) * m), (x.angle() + y.angle()) / 2)
    torch.testing.assert_close(merge_latents([x, y], weights=[a, 1 - a], rule="published"), expected)


def test_phases_about_pi_do_not_cancel() -> None:
    near = [torch.polar(torch.ones(1), torch.tensor([sign * (math.pi - 0.1)])) for sign in (1, -1)]
    assert merge_latents(near)[0].real.item() == pytest.approx(-1, abs=1e-6)
    assert merge_latents(near, rule="published")[0].real.item() == pytest.approx(0.5, abs=1e-6)  # the wrong way around


def test_edges() -> None:
    zero, one = torch.zeros(2, dtype=torch.complex64), torch.tensor([1.0, 2j])
    assert merge_latents([one, zero]).tolist() == [0, 0]  # a frequency that one lacks
    assert merge_latents([one, zero], rule="published").tolist() == [0, 0]
    assert merge_latents([zero, zero], rule="published").tolist() == [0, 0]
    assert torch.equal(merge_latents([one, zero], weights=[1.0, 0.0]), one)  # of no weight
    torch.testing.assert_close(merge_latents([one, -one]), one)  # phases that cancel
    assert merge_latents([one[:0], one[:0]]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_real_latents_are_transformed_and_back(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(3, 6, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    for dim in (1, -1):
        waves = [torch.fft.fft(x.double(), dim=dim) for x in latents]
        expected = torch.fft.ifft(merge_latents(waves), dim=dim)
        assert expected.imag.abs().max() < 1e-12
        merged = merge_latents(latents, dim=dim)
        assert merged.dtype == dtype
        near = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]
        torch.testing.assert_close(merged.double(), expected.real, rtol=near, atol=near)
    torch.testing.assert_close(merge_latents([latents[0]] * 3), latents[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        ([torch.ones(2)], {}, "^latents must be two tensors or more, got 1$"),
        ([torch.ones(2)] * 3, {"rule": "published"}, "^latents must be two tensors, got 3$"),
        ([torch.ones(2), torch.ones(3)], {}, r"^latents\[1\] must have the shape of latents\[0\], \(2,\), got \(3,\)$"),
        ([torch.ones(2)] * 2, {"weights": [1.0, -1.0]}, "^weights must be 0 or greater and not all 0, got "),
        ([torch.ones(2)] * 2, {"rule": "sum"}, "^rule must be one of 'paper', 'published', got 'sum'$"),
        ([torch.ones(2, dtype=torch.int64)] * 2, {}, "^latents must be floating-point of one dimension or more, or"),
        ([torch.ones(())] * 2, {}, "^latents must be floating-point of one dimension or more, or complex, got "),
    ],
)
def test_arguments_are_checked(latents: list[Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_latents(latents, **options)


def heads(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return {
        "weight": weight,
        "tied": weight,
        "bias": torch.randn(5, generator=generator).double(),
        "n": torch.tensor(1),
    }


def test_heads_are_on_the_arc() -> None:
    first, second = heads(0), heads(1)
    expected = merge_state_dicts(first, [second], method="slerp", t=0.3)
    assert all(torch.equal(merge_heads(first, second, t=0.3)[name], expected[name]) for name in first)
    torch.testing.assert_close(merge_heads(first, second, t=1.0)["weight"], second["weight"])
    with_zeros = merge_heads(first | {"bias": torch.zeros(5).double()}, second)
    torch.testing.assert_close(with_zeros["bias"], second["bias"] * math.sin(math.pi / 4))


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_heads_of_the_published_code(t: float) -> None:
    first, second = heads(0), heads(1)
    merged = merge_heads(first, second, t=t, rule="published")
    for name in ("weight", "bias"):
        a, b = first[name], second[name]
        cosine = (a * b).sum() / (a.norm() * b.norm())
        beside = b - a * cosine
        expected = a * (cosine.acos() * t).cos() + beside / beside.norm() * (cosine.acos() * t).sin()
        torch.testing.assert_close(merged[name], expected)
    assert merged["tied"] is merged["weight"] and merged["n"].item() == 1
    assert t == 0 or not torch.allclose(merge_heads(first, second, t=1.0, rule="published")["weight"], second["weight"])


def test_heads_that_give_no_number_there() -> None:
    first = heads(0)
    zeros = first | {"bias": torch.zeros(5).double()}
    torch.testing.assert_close(merge_heads(zeros, first, t=0.25, rule="published")["bias"], 0.25 * first["bias"])
    same = merge_heads(first, first, rule="published")
    torch.testing.assert_close(same["weight"], first["weight"])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="^t must be finite, got "):
            merge_heads(first, first, t=bad, rule="published")
