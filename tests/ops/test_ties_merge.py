"""ties_merge against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import reference, ties_merge
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SEMANTICS,
    SHAPES,
    Inputs,
    assert_same,
    cancelling,
    densities_of,
    equal,
    gaussian,
    grid,
    inputs,
    laid_out,
    large,
    leaning_down,
    leaning_up,
    merge_options,
    option_id,
    rising,
    rows,
    sparse,
    weights_of,
    with_weights,
)

LARGE = 100_003  # past the size from which thresholds start with a sample
LAYOUTS = ["transposed", "strided", "expanded", "unaligned", "stacked"]


def check(base: Tensor | None, experts: list[Tensor] | Tensor, what: str = "", **options: Any) -> None:
    expected = reference.ties_merge(base, experts, **options)
    assert_same(ties_merge(base, experts, **options), expected, f"{what} {options}")


def exact_l1_norms(kind: Any, dtype: torch.dtype) -> bool:
    """The oracle's L1 norms are exact; a float64 sum of float64 numbers is not."""
    return dtype != torch.float64 or kind in (grid, sparse, equal, cancelling, leaning_up, leaning_down)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("options", merge_options(), ids=option_id)
def test_every_option_on_every_kind_of_data(options: dict[str, Any], dtype: torch.dtype) -> None:
    for kind in KINDS:
        if options.get("rescale") and not exact_l1_norms(kind, dtype):
            continue
        for num_tasks, density, lam in ((3, 0.2, 1.0), (4, 0.5, -0.3)):
            base, experts = inputs(kind, 257, num_tasks, dtype)
            check(base, experts, kind.__name__, density=density, lam=lam, **with_weights(options, num_tasks))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in (gaussian, grid):
        base, experts = inputs(kind, shape, 3, dtype)
        for semantics in SEMANTICS:
            check(base, experts, lam=0.3, semantics=semantics)
            check(None, experts, lam=0.3, semantics=semantics)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int, dtype: torch.dtype) -> None:
    for kind in (gaussian, leaning_down):
        base, experts = inputs(kind, 333, num_tasks, dtype)
        check(base, experts, density=densities_of(num_tasks), lam=0.3)
        check(base, experts, reduce="max")
        for semantics in ("mergekit", "peft"):
            check(base, experts, density=densities_of(num_tasks), weights=weights_of(num_tasks), semantics=semantics)
            check(base, experts, semantics=semantics, elect="count")
        check(base, experts, weights=weights_of(num_tasks), semantics="mergekit", elect="none")


@pytest.mark.parametrize("density", [1.0, 1e-9, 0.2, 0.999])
@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3, -2.5, 1e-30])
def test_every_number(lam: float, density: float) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, 1_000, 3, dtype)
        for semantics in SEMANTICS:
            for reduce in ("mean", "sum"):
                check(base, experts, lam=lam, density=density, semantics=semantics, reduce=reduce)


@pytest.mark.parametrize(
    "weights", [0.0, -1.0, 0.1, [0.5, -0.4999999, 0.0], [1e-8, 3.0, -1e4], [0.0, 0.0, 0.0]], ids=str
)
def test_every_weight(weights: float | list[float]) -> None:
    for dtype in DTYPES:
        for kind in (gaussian, grid):
            base, experts = inputs(kind, 1_000, 3, dtype)
            for options in (
                {"semantics": "peft"},
                {"semantics": "mergekit"},
                {"semantics": "mergekit", "normalize": False},
                {"semantics": "mergekit", "elect": "none"},
            ):
                check(base, experts, weights=weights, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, dtype: torch.dtype) -> None:
    base, experts = inputs(grid, (12, 21), 3, dtype)
    for semantics in SEMANTICS:
        expected = reference.ties_merge(base, experts, semantics=semantics)
        if layout == "stacked":
            assert_same(ties_merge(base, torch.stack(experts), semantics=semantics), expected)
            assert_same(ties_merge(base, torch.stack(experts, dim=1).transpose(0, 1), semantics=semantics), expected)
        elif layout == "expanded":
            row = base[:1].expand(12, 21)
            check(row, experts, semantics=semantics)
            check(row, [experts[0], row, experts[1][:, :1].expand(12, 21)], semantics=semantics)
        else:
            moved = [laid_out(x, layout) for x in (base, *experts)]
            assert_same(ties_merge(moved[0], moved[1:], semantics=semantics), expected)
            assert_same(ties_merge(base, [experts[0], *moved[2:]], semantics=semantics), expected)


def test_one_storage_may_hold_several_inputs() -> None:
    base, experts = inputs(grid, 500, 2, torch.float32)
    check(base, [experts[0], experts[0], base])
    together = torch.cat([base, *experts])
    check(together[:500], list(together[500:].split(500)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, equal, rows, rising, leaning_up, leaning_down], ids=option_id)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_large(semantics: str, kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, LARGE, 3, dtype)
    check(base, experts, lam=0.3, semantics=semantics)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=option_id)
def test_a_million_elements(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, 1_000_003, 2, dtype)
    check(base, experts, density=[0.2, 0.9], semantics="mergekit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=option_id)
def test_large_rescale(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, LARGE, 3, dtype)
    check(base, experts, semantics="mergekit", rescale=True, weights=weights_of(3))
    check(None, experts, semantics="mergekit", rescale=True, density=0.01, reduce="sum")


def test_rescale_in_float64() -> None:
    for kind in (gaussian, rows):
        base, experts = inputs(kind, 20_001, 3, torch.float64)
        options: dict[str, Any] = {"semantics": "mergekit", "rescale": True}
        expected = reference.ties_merge(base, experts, **options)
        torch.testing.assert_close(ties_merge(base, experts, **options), expected, rtol=1e-14, atol=1e-14)


def test_task_vectors_that_vanish_are_not_rescaled() -> None:
    experts = [torch.zeros(100), torch.full((100,), 1e-10), torch.full((100,), 2e-9)]
    check(None, experts, semantics="mergekit", rescale=True, density=0.3)


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
@pytest.mark.parametrize("kind", [cancelling, leaning_up, leaning_down], ids=option_id)
def test_draws_take_the_sign_of_the_scope(kind: Any, num_tasks: int) -> None:
    for dtype in DTYPES:
        for count in (100, 9_001):
            base, experts = inputs(kind, count, num_tasks, dtype)
            for elect in ("sum", "count"):
                for reduce in ("mean", "max"):
                    check(base, experts, f"{count} elements", density=1.0, elect=elect, reduce=reduce)


def test_one_late_element_decides_every_draw() -> None:
    experts = [torch.full((200_000,), 0.5), torch.full((200_000,), -0.25), torch.full((200_000,), -0.25)]
    for late in (0.75, -0.75):
        experts[0][-1] = late
        check(None, experts, density=1.0)
        assert ties_merge(None, experts, density=1.0)[0] == (0.5 if late > 0 else -0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_given_thresholds_keep_every_tie(dtype: torch.dtype) -> None:
    base, experts = inputs(grid, 5_000, 3, dtype)
    thresholds = torch.tensor([3 / 64, 0.0, 5 / 64])
    for semantics in SEMANTICS:
        check(base, experts, semantics=semantics, thresholds=thresholds)
        check(base, experts, semantics=semantics, thresholds=thresholds.double(), density=0.01)
        check(base, experts, semantics=semantics, thresholds=[0.1, math.inf, 1e-50])


@pytest.mark.parametrize("elect", ["sum", "count", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_values(dtype: torch.dtype, elect: str) -> None:
    base, experts = inputs(grid, 1_000, 3, dtype)
    experts[0][[1, 10, 20]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    experts[2][[10, 30]] = torch.tensor([-math.inf, math.inf], dtype=dtype)
    for nonfinite in ("drop", "propagate"):
        for semantics in SEMANTICS if elect != "none" else ["mergekit"]:
            for density in (0.2, 1.0, 1e-9):
                check(base, experts, semantics=semantics, elect=elect, nonfinite=nonfinite, density=density)
            check(base, experts, semantics=semantics, nonfinite=nonfinite, thresholds=[0.05, 0.05, 0.05])
    base[5] = math.nan
    for nonfinite in ("drop", "propagate"):
        assert ties_merge(base, experts, nonfinite=nonfinite)[5].isnan()


@pytest.mark.parametrize("elect", ["sum", "count"])
def test_nan_has_no_vote(elect: str) -> None:
    up, down = torch.ones(5), -torch.ones(5)
    for number in (math.nan, -math.nan):
        up[:2] = number
        down[:2] = 0.0
        options: dict[str, Any] = {"elect": elect, "density": 1.0, "reduce": "sum", "nonfinite": "propagate"}
        check(None, [up, down], **options)
        for decided in (1.0, -1.0):
            check(None, [up, down, torch.tensor([0.0, 0.0, 0.0, 0.0, decided])], **options)


def test_sums_past_the_range_become_infinite() -> None:
    for dtype in (torch.float32, torch.float16):
        _, experts = inputs(large, 1_000, 20, dtype)
        assert ties_merge(None, experts, density=1.0, reduce="sum").isinf().any()
        check(None, experts, density=1.0, reduce="sum")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Inputs, dict[str, Any]]:
    dtype = draw(st.sampled_from(DTYPES))
    num_tasks = draw(st.integers(1, 6))
    count = draw(st.integers(0, 40))
    step = draw(st.sampled_from([1 / 64, 0.1, 3.0, 1e-7]))
    whole = st.lists(st.integers(-6, 6), min_size=count, max_size=count)
    base, *experts = [torch.tensor(draw(whole)).mul(step).to(dtype) for _ in range(num_tasks + 1)]
    options = dict(draw(st.sampled_from(merge_options())))
    if options.get("weights"):
        options["weights"] = draw(st.lists(st.floats(-2, 2), min_size=num_tasks, max_size=num_tasks))
    if dtype == torch.float64:
        options.pop("rescale", None)
    options["density"] = draw(st.lists(st.sampled_from([0.01, 0.2, 0.5, 1.0]), min_size=num_tasks, max_size=num_tasks))
    options["lam"] = draw(st.sampled_from([1.0, 0.3, -1.5]))
    return (base, experts), options


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=option_id)
def test_both_ends_of_the_16_bit_formats(dtype: torch.dtype) -> None:
    """What is kept is rounded as a normal number where it, what it is scaled to, and its sums surely are."""
    format = torch.finfo(dtype)
    lowest, highest = math.frexp(format.smallest_normal)[1], math.frexp(format.max)[1]
    base, experts = inputs(gaussian, 2_000, 3, torch.float64)
    for exponent in (*range(lowest - 10, lowest + 12, 3), *range(highest - 20, highest + 1, 3)):
        scaled = [(math.ldexp(1, exponent) * x / 4).clamp(-format.max, format.max) for x in (base, *experts)]
        of_dtype = [x.to(dtype) for x in scaled]
        for semantics, weights in (
            ("paper", None),
            ("mergekit", None),
            ("mergekit", [1.0, 2.0**-9, 0.0]),
            ("peft", 64.0),
        ):
            options = {"semantics": semantics, "weights": weights, "nonfinite": "propagate"}
            check(of_dtype[0], of_dtype[1:], f"2^{exponent}", density=[0.5, 0.2, 0.9], **options)
            check(of_dtype[0], of_dtype[1:], f"2^{exponent}", reduce="sum", lam=-3.0, **options)


@given(problem=problems(), with_base=st.booleans())
def test_any_problem(problem: tuple[Inputs, dict[str, Any]], with_base: bool) -> None:
    (base, experts), options = problem
    check(base if with_base else None, experts, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=option_id)
def test_error_of_low_precision(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, 20_001, 8, dtype)
    thresholds = [0.1] * 8
    for semantics in SEMANTICS:
        exact = reference.ties_merge(
            base, experts, thresholds=thresholds, semantics=semantics, compute_dtype=torch.float64
        )
        merged = ties_merge(base, experts, thresholds=thresholds, semantics=semantics).double()
        # elections that the storage's rounding of a task vector tips are boundary cases: few
        assert ((merged - exact).abs() > 2 * torch.finfo(dtype).eps * exact.abs().clamp(min=1)).float().mean() < 0.01


@pytest.mark.parametrize("size", [10, 1_000, 5_000])
def test_differences_that_overflow_tie_at_infinity(size: int) -> None:
    base = torch.full((size,), -60_000.0, dtype=torch.float16)
    expert = base.clone()
    expert[torch.arange(size) % 5 < 3] = 60_000.0
    for semantics in ("paper", "mergekit", "peft"):
        options = {"density": 0.2, "semantics": semantics, "nonfinite": "propagate"}
        merged = ties_merge(base, [expert], **options)
        assert_same(merged, reference.ties_merge(base, [expert], **options), semantics)
