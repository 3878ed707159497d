"""trim_thresholds against the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import _C, reference, ties_merge, trim_thresholds
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SEMANTICS,
    SHAPES,
    assert_same,
    densities_of,
    equal,
    gaussian,
    grid,
    inputs,
    option_id,
    rising,
    rows,
    sparse,
)

LARGE = 100_003  # past the size from which thresholds start with a sample
LARGE_KINDS = [gaussian, grid, sparse, equal, rows, rising]


def check(base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    assert_same(
        trim_thresholds(base, experts, **options), reference.trim_thresholds(base, experts, **options), str(options)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, 1_000, 3, dtype)
    for semantics in SEMANTICS:
        for density in (1e-6, 0.05, 0.2, 0.5, 0.999, 1.0, [0.3, 1e-9, 1.0]):
            check(base, experts, density=density, semantics=semantics)
            check(None, experts, density=density, semantics=semantics)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, shape, 2, dtype)
    for semantics in SEMANTICS:
        for density in (0.2, 1.0):
            check(base, experts, density=density, semantics=semantics)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    base, experts = inputs(grid, 257, num_tasks, torch.bfloat16)
    check(base, experts, density=densities_of(num_tasks), semantics="mergekit")


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", LARGE_KINDS, ids=option_id)
def test_sampled_bracket(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, LARGE, 2, dtype)
    for density in (1e-6, 0.2, 0.97):
        check(base, experts, density=density)


@pytest.mark.parametrize("count", [32_767, 32_768, 32_769, 65_536, 300_001])
def test_around_the_sizes_where_the_method_changes(count: int) -> None:
    base, experts = inputs(gaussian, count, 1, torch.float32)
    for density in (1 / count, 0.2, 1 - 1 / count):
        check(base, experts, density=density, semantics="peft")


def test_a_million_elements_of_each_dtype() -> None:
    for dtype in DTYPES:
        base, experts = inputs(rows, 1_000_003, 1, dtype)
        check(base, experts, density=0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_a_sample_that_misjudges_the_data(dtype: torch.dtype) -> None:
    # all that matters lies in a few places that a sample spread over the tensor can hardly meet
    x = torch.full((LARGE,), 1e-3)
    x[43_210 : 43_210 + 700] = torch.linspace(1, 2, 700)
    y = torch.where(torch.arange(LARGE) % 64 < 3, torch.linspace(0, 1, LARGE), torch.linspace(1, 0, LARGE))
    for density in (700 / LARGE, 350 / LARGE, 0.001, 0.05, 0.5):
        check(None, [x.to(dtype), y.to(dtype), x.flip(0).to(dtype)], density=density)


@pytest.fixture
def forced_histogram() -> Iterator[None]:
    """Every bracket counts as missed."""
    _C.force_histogram(True)
    yield
    _C.force_histogram(False)


@pytest.mark.usefixtures("forced_histogram")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, sparse, rows], ids=option_id)
def test_histogram_fallback(kind: Any, dtype: torch.dtype) -> None:
    for count in (1, 65, 5_000, 40_003):
        base, experts = inputs(kind, count, 3, dtype)
        for semantics in SEMANTICS if count < 40_000 else ("mergekit",):
            options = {"density": [0.2, 0.7, 1e-4], "semantics": semantics}
            check(base, experts, **options)
            assert_same(ties_merge(base, experts, **options), reference.ties_merge(base, experts, **options))


@given(
    keys=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=200),
    density=st.floats(0, 1, exclude_min=True),
    semantics=st.sampled_from(SEMANTICS),
)
def test_any_numbers(keys: list[float], density: float, semantics: str) -> None:
    check(None, [torch.tensor(keys)], density=density, semantics=semantics)
    check(None, [torch.tensor(keys, dtype=torch.float64)], density=density, semantics=semantics)


def test_nothing_kept_and_everything_kept() -> None:
    x = torch.tensor([3.0, -1.0, 2.0])
    assert trim_thresholds(None, [x], density=0.2, semantics="peft").tolist() == [math.inf]
    assert trim_thresholds(None, [x], density=1.0, semantics="peft").tolist() == [0.0]
    assert trim_thresholds(None, [x], density=0.34).tolist() == [2.0]
    assert trim_thresholds(None, [x[:0]], density=0.34).tolist() == [0.0]


@pytest.mark.parametrize("count", [1_000, LARGE])
def test_nonfinite(count: int) -> None:
    base, experts = inputs(gaussian, count, 3, torch.float32)
    experts[1][[5, 77, 500]] = torch.tensor([math.nan, math.inf, -math.inf])
    for nonfinite in ("drop", "propagate"):
        for density in (1e-9, 2.5 / count, 0.2):
            check(base, experts, density=density, nonfinite=nonfinite)


def test_thresholds_reproduce_the_merge() -> None:
    base, experts = inputs(gaussian, LARGE, 3, torch.float32)
    thresholds = trim_thresholds(base, experts, density=[0.2, 0.5, 0.9])
    assert_same(ties_merge(base, experts, thresholds=thresholds), ties_merge(base, experts, density=[0.2, 0.5, 0.9]))


def check_limits(bases: list[Tensor], experts: list[list[Tensor]], **options: Any) -> None:
    """experts: [num_tensors][num_tasks]. The limits keep what the oracle keeps, entry by entry."""
    flat = [expert for of_tensor in experts for expert in of_tensor]
    density, semantics, nonfinite = options["density"], options["semantics"], options.get("nonfinite", "error")
    by_expert = list(zip(*experts, strict=True))
    keys = reference.scope_keys(reference.load_scope(bases, by_expert, nonfinite, None))
    thresholds, cuts = torch.ops.surgery_kernels.trim_limits(bases, flat, **options)
    assert_same(thresholds, reference.scope_thresholds(bases, by_expert, **options), str(options))
    assert (cuts.dtype, cuts.shape) == (torch.int64, thresholds.shape)
    before_cut = torch.arange(keys.shape[1]) < cuts[:, None]
    for t, threshold in enumerate(thresholds):
        keep = reference.keep_count(keys.shape[1], density[t], semantics)
        expected = reference.kept_entries(keys[t], threshold, None if semantics == "paper" else keep)
        kept = (keys[t] > threshold) | keys[t].isnan() | ((keys[t] == threshold) & before_cut[t])
        assert torch.equal(kept, expected), f"expert {t}, {options}"


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, sparse, equal], ids=option_id)
def test_limits(kind: Any, dtype: torch.dtype) -> None:
    sizes = [700, 0, 1, 40_000]
    base, experts = inputs(kind, sum(sizes), 3, dtype)
    by_tensor = [list(parts) for parts in zip(*(expert.split(sizes) for expert in experts), strict=True)]
    for semantics in SEMANTICS:
        for density in ([0.2, 1.0, 0.5], [1e-9, 0.03, 0.999]):
            check_limits(list(base.split(sizes)), by_tensor, density=density, semantics=semantics)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_limits_over_several_dtypes(semantics: str) -> None:
    problems = [inputs(grid, 20_001, 2, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
    check_limits(bases, experts, density=[0.2, 0.6], semantics=semantics)


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
def test_limits_of_nonfinite_values(nonfinite: str) -> None:
    base, experts = inputs(grid, 1_000, 2, torch.float32)
    experts[0][[5, 77, 500]] = torch.tensor([math.nan, math.inf, -math.inf])
    for semantics in ("mergekit", "peft"):
        for density in ([0.001, 0.2], [0.002, 1e-9], [0.5, 1.0]):
            check_limits([base], [experts], density=density, semantics=semantics, nonfinite=nonfinite)


def test_limits_name_the_tensor_that_is_not_finite() -> None:
    experts = [torch.zeros(5), torch.tensor([math.nan, 1.0])]
    message = r"^experts\[0\] must be finite, got 1 NaN or infinite values in tensor 'second'$"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.surgery_kernels.trim_limits([], experts, [0.5], names=["first", "second"])
