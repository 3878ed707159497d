"""ties_merge_out: several tensors are one scope, in one call or in several that share their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import reference
from tests.cases import (
    DTYPES,
    SEMANTICS,
    assert_same,
    bits,
    cancelling,
    equal,
    gaussian,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    option_id,
    weights_of,
    with_weights,
)

PARTS = [(40, 50), (), (0, 3), (4_099,), (3, 7, 11), (1,), (30_000,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, equal, cancelling, leaning_up, leaning_down], ids=option_id)
def test_several_tensors_are_one_scope(kind: Any, dtype: torch.dtype) -> None:
    sizes = [torch.Size(shape).numel() for shape in PARTS]
    base, experts = inputs(kind, sum(sizes), 4, dtype)

    def parts(flat: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part, shape in zip(flat.split(sizes), PARTS, strict=True)]

    bases, by_tensor = parts(base), list(zip(*(parts(expert) for expert in experts), strict=True))
    density = [0.2, 0.9, 0.05, 0.5]
    for semantics in SEMANTICS:
        out = [torch.full_like(part, math.nan) for part in bases]
        torch.ops.surgery_kernels.ties_merge_out(
            bases, [expert for tensor in by_tensor for expert in tensor], density, 0.3, semantics=semantics, out=out
        )
        merged = torch.cat([part.reshape(-1) for part in out])
        assert_same(
            merged, reference.ties_merge(base, experts, density=density, lam=0.3, semantics=semantics), semantics
        )


@pytest.mark.parametrize("rescale", [False, True])
def test_several_dtypes_are_one_scope(rescale: bool) -> None:
    bases, experts = [], []
    for dtype, count in ((torch.float32, 1_000), (torch.bfloat16, 20_000), (torch.float16, 3_333)):
        base, of_tensor = inputs(gaussian, count, 3, dtype)
        bases.append(base)
        experts.append(of_tensor)
    out = [torch.full_like(base, math.nan) for base in bases]
    options: dict[str, Any] = {"semantics": "mergekit", "rescale": rescale, "weights": weights_of(3)}
    torch.ops.surgery_kernels.ties_merge_out(
        bases, [expert for of_tensor in experts for expert in of_tensor], [0.3] * 3, out=out, **options
    )
    expected = reference.scope_merge(bases, list(zip(*experts, strict=True)), density=0.3, **options)
    for part, expected_part in zip(out, expected, strict=True):
        assert_same(part, expected_part)


def merge_scope(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], density: Sequence[float], **options: Any
) -> list[Tensor]:
    """One call of the op for several tensors; experts: [num_tensors][num_tasks]."""
    flat, out = [expert for of_tensor in experts for expert in of_tensor], [torch.full_like(b, math.nan) for b in bases]
    torch.ops.surgery_kernels.ties_merge_out(bases, flat, density, **options, out=out)
    return out


def merge_in_calls(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    density: Sequence[float],
    tensors_per_call: Sequence[int],
    **options: Any,
) -> list[Tensor]:
    """The same in several calls, by the limits of the whole scope."""
    asked = {name: options[name] for name in ("semantics", "nonfinite") if name in options}
    flat = [expert for of_tensor in experts for expert in of_tensor]
    thresholds, cuts = torch.ops.surgery_kernels.trim_limits(bases, flat, density, **asked)
    out: list[Tensor] = []
    for count in tensors_per_call:
        call = slice(len(out), len(out) + count)
        before = sum(base.numel() for base in bases[: len(out)])
        limits = {"thresholds": thresholds, "cuts": (cuts - before).tolist()}
        out += merge_scope(bases[call], experts[call], density, **limits, **options)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"semantics": "mergekit"},
        {"semantics": "mergekit", "weights": True, "rescale": True},
        {"semantics": "mergekit", "weights": True, "elect": "none"},
        {"semantics": "peft"},
        {"semantics": "peft", "weights": True, "elect": "count"},
    ],
    ids=option_id,
)
def test_calls_that_share_their_limits_are_one_scope(options: dict[str, Any]) -> None:
    tensors = [(torch.float32, 1_000), (torch.bfloat16, 20_000), (torch.float16, 0), (torch.float16, 333)]
    for kind in (gaussian, grid, equal):
        for dtypes in ([dtype for dtype, _ in tensors], [torch.bfloat16] * 4, [torch.float64] * 4):
            problems = [inputs(kind, n, 3, dtype) for dtype, (_, n) in zip(dtypes, tensors, strict=True)]
            bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
            for density in ([0.2, 1.0, 0.57], [1e-6, 0.9, 0.03]):
                every = {**with_weights(options, 3), "lam": 0.3}
                whole = merge_scope(bases, experts, density, **every)
                for nonfinite in ("error", "propagate"):
                    calls = merge_in_calls(bases, experts, density, [1, 2, 1], nonfinite=nonfinite, **every)
                    for part, expected in zip(calls, whole, strict=True):
                        assert torch.equal(bits(part), bits(expected)), f"{kind.__name__} {dtypes} {density}"


def test_calls_under_the_paper_are_one_scope_without_draws() -> None:
    # the sign of a draw is that of the sum of all elected signs, which no call knows alone
    problems = [inputs(gaussian, n, 3, torch.float32) for n in (1_000, 20_000, 333)]
    bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
    whole = merge_scope(bases, experts, [0.2, 1.0, 0.57])
    for part, expected in zip(merge_in_calls(bases, experts, [0.2, 1.0, 0.57], [2, 1]), whole, strict=True):
        assert_same(part, expected)


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
@pytest.mark.parametrize("semantics", ["mergekit", "peft"])
def test_nonfinite_values_in_calls_that_share_their_limits(semantics: str, nonfinite: str) -> None:
    for dtype in DTYPES:
        problems = [inputs(grid, n, 2, dtype) for n in (100, 900)]
        bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
        for of_tensor in experts:
            of_tensor[0][[1, 10, 20, 30]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=dtype)
        # 1e-9: of expert 0 one NaN is the threshold under mergekit, nothing is kept under peft
        for density in ([1e-9, 0.2], [0.006, 1.0], [0.5, 1e-9]):
            options = {"semantics": semantics, "nonfinite": nonfinite}
            whole = merge_scope(bases, experts, density, **options)
            for part, expected in zip(merge_in_calls(bases, experts, density, [1, 1], **options), whole, strict=True):
                assert_same(part, expected, f"{dtype} {density}")


@st.composite
def scopes(draw: st.DrawFn) -> tuple[list[Tensor], list[list[Tensor]], list[int]]:
    """Tensors full of ties, and how many of them each call takes."""
    num_tasks, wide = draw(st.integers(1, 4)), draw(st.booleans())
    bases, experts = [], []
    for _ in range(draw(st.integers(1, 6))):
        dtype = torch.float64 if wide else draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        count = draw(st.integers(0, 12))
        whole = st.lists(st.integers(-2, 2), min_size=count, max_size=count)
        base, *of_tensor = [torch.tensor(draw(whole)).mul(0.1).to(dtype) for _ in range(num_tasks + 1)]
        bases.append(base)
        experts.append(of_tensor)
    ends = draw(st.lists(st.booleans(), min_size=len(bases) - 1, max_size=len(bases) - 1))
    calls = [1]
    for ends_here in ends:
        calls = [*calls, 1] if ends_here else [*calls[:-1], calls[-1] + 1]
    return bases, experts, calls


@given(scope=scopes(), data=st.data())
def test_any_calls_that_share_their_limits(
    scope: tuple[list[Tensor], list[list[Tensor]], list[int]], data: st.DataObject
) -> None:
    bases, experts, calls = scope
    num_tasks = len(experts[0])
    density = data.draw(st.lists(st.sampled_from([0.01, 0.2, 0.5, 1.0]), min_size=num_tasks, max_size=num_tasks))
    for semantics in ("mergekit", "peft"):
        whole = merge_scope(bases, experts, density, semantics=semantics)
        expected = reference.scope_merge(bases, list(zip(*experts, strict=True)), density=density, semantics=semantics)
        in_calls = merge_in_calls(bases, experts, density, calls, semantics=semantics)
        for part, of_whole, of_oracle in zip(in_calls, whole, expected, strict=True):
            assert torch.equal(bits(part), bits(of_whole))
            assert_same(part, of_oracle)
