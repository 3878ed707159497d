"""trim_thresholds against the oracle."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import reference, ties_merge, trim_thresholds
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("num_values", [1, 3, 9, 30])
def test_few_values_near_the_threshold(num_values: int, dtype: torch.dtype) -> None:
    """Neighbouring numbers of 16 bits, and differences that are rounded to them, ties to even among these."""
    g = torch.Generator().manual_seed(num_values)
    one = torch.ones((), dtype=dtype).view(torch.int16)
    steps = torch.randint(0, num_values, (2, 10_000), generator=g)
    magnitudes = (one + steps.to(torch.int16)).view(dtype)
    experts = magnitudes * (torch.randint(0, 2, steps.shape, generator=g) * 2 - 1).to(dtype)
    base = (torch.randint(-8, 9, steps.shape[1:], generator=g) * torch.finfo(dtype).eps / 4).to(dtype)
    for density in (0.2, [0.5, 0.9999]):
        for semantics in SEMANTICS:
            check(None, list(experts), density=density, semantics=semantics)
            check(base, list(experts), density=density, semantics=semantics)
    for nonfinite, number in (("propagate", math.nan), ("drop", math.inf), ("propagate", torch.finfo(dtype).max)):
        experts[0][:100] = number
        check(base, list(experts), density=0.2, nonfinite=nonfinite)
    for semantics in ("mergekit", "peft"):  # where the ties end
        merged = ties_merge(base, list(experts), density=0.2, semantics=semantics, nonfinite="propagate")
        expected = reference.ties_merge(base, list(experts), density=0.2, semantics=semantics, nonfinite="propagate")
        assert_same(merged, expected, semantics)


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


def check_ranks(bases: list[Tensor], experts: list[list[Tensor]], ranks: list[int], nonfinite: str = "error") -> None:
    """The sets that the limits describe are those of stable sorts, and thresholds their last elements."""
    flat = [expert for of_tensor in experts for expert in of_tensor]
    by_expert = list(zip(*experts, strict=True))
    keys = reference.scope_keys(reference.load_scope(bases, by_expert, nonfinite, None))
    options = {"nonfinite": nonfinite, "ranks": ranks * len(by_expert)}
    thresholds, cuts = torch.ops.surgery_kernels.trim_limits(bases, flat, [0.1] * len(by_expert), "paper", **options)
    assert thresholds.shape == cuts.shape == (len(options["ranks"]),)
    for i, rank in enumerate(options["ranks"]):
        of_expert, threshold = keys[i // len(ranks)], thresholds[i]
        same = (of_expert == threshold) | (of_expert.isnan() & threshold.isnan())  # NaN is the largest
        above = (of_expert > threshold) | (of_expert.isnan() & ~same)
        described = (above if rank >= 0 else ~above & ~same) | (same & (torch.arange(len(of_expert)) < cuts[i]))
        if rank == 0:
            assert (threshold.item(), cuts[i].item()) == (math.inf, 0)
        else:
            assert same.any()
            assert torch.equal(described, reference.ranked_entries(of_expert, rank)), f"rank {rank}"


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, sparse, equal], ids=option_id)
@pytest.mark.parametrize("count", [1, 2, 700, 40_701])
def test_limits_of_several_ranks(count: int, kind: Any, dtype: torch.dtype) -> None:
    sizes = [count - count // 3, 0, count // 3]
    base, experts = inputs(kind, count, 2, dtype)
    by_tensor = [list(parts) for parts in zip(*(expert.split(sizes) for expert in experts), strict=True)]
    ranks = sorted({0, 1, count // 100, count // 2, count - count // 100, count})
    check_ranks(list(base.split(sizes)), by_tensor, [*ranks, *(-rank for rank in ranks if rank)])


@pytest.mark.usefixtures("forced_histogram")
@pytest.mark.parametrize("kind", [gaussian, grid, sparse, equal], ids=option_id)
def test_several_ranks_by_the_histogram(kind: Any) -> None:
    base, experts = inputs(kind, 20_003, 2, torch.float32)
    check_ranks([base], [experts], [1, 300, 20_003, -1, -300, -20_003])


def test_ranks_over_several_dtypes() -> None:
    problems = [inputs(grid, 5_001, 2, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    check_ranks([base for base, _ in problems], [of_tensor for _, of_tensor in problems], [7_000, 30, -30, -7_000])


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
def test_ranks_of_nonfinite_values(nonfinite: str) -> None:
    base, experts = inputs(grid, 1_000, 2, torch.float32)
    experts[0][[5, 77, 500]] = torch.tensor([math.nan, math.inf, -math.inf])
    check_ranks([base], [experts], [1, 2, 3, 4, 990, -3, -990, -998, -999, -1_000], nonfinite)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.1, 0.3), (0.9, 0.3), (0.01, 0.0)])
@pytest.mark.parametrize("kind", [gaussian, grid, sparse, equal], ids=option_id)
def test_ranks_give_the_positions_of_a_stable_sort(kind: Any, density: float, gamma: float) -> None:
    """Breadcrumbs: neither the largest nor the smallest are kept."""
    _, (expert,) = inputs(kind, 5_003, 1, torch.bfloat16)
    count = expert.numel()
    keep, top = int(density * count), int(gamma * count)
    low = max(0, count - keep - top)
    ranks = [-(low + keep), -low]
    thresholds, cuts = torch.ops.surgery_kernels.trim_limits([], [expert], [1.0], ranks=ranks)
    magnitudes, at = expert.float().abs(), torch.arange(count)
    if low == 0:
        thresholds[1] = cuts[1] = 0
    smallest = [(magnitudes < t) | ((magnitudes == t) & (at < cut)) for t, cut in zip(thresholds, cuts, strict=True)]
    kept = torch.zeros(count, dtype=torch.bool)
    kept[magnitudes.sort(stable=True).indices[low : low + keep]] = True
    assert torch.equal(smallest[0] & ~smallest[1], kept)


def test_ranks_of_nothing_and_of_an_expert_that_is_not_read() -> None:
    thresholds, cuts = torch.ops.surgery_kernels.trim_limits([], [torch.zeros(0)], [0.5], ranks=[0, 0])
    assert (thresholds.tolist(), cuts.tolist()) == ([math.inf] * 2, [0, 0])
    experts = [torch.ones(5), torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0])]
    with pytest.raises(RuntimeError, match=r"^experts\[1\] must be finite, got 1 NaN or infinite values$"):
        torch.ops.surgery_kernels.trim_limits([], experts, [0.5] * 2, ranks=[3, 1, 0, 0])


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([6, 1], "ranks must be in [-5, 5], the number of entries, got 6"),
        ([1, -6], "ranks must be in [-5, 5], the number of entries, got -6"),
        ([1, 2, 3], "ranks must be as many for every expert (2), got 3"),
        ([], "ranks must be as many for every expert (2), got 0"),
    ],
    ids=str,
)
def test_ranks_that_are_refused(ranks: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        torch.ops.surgery_kernels.trim_limits([], [torch.zeros(5)] * 2, [0.5] * 2, ranks=ranks)


def test_limits_name_the_tensor_that_is_not_finite() -> None:
    experts = [torch.zeros(5), torch.tensor([math.nan, 1.0])]
    message = r"^experts\[0\] must be finite, got 1 NaN or infinite values in tensor 'second'$"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.surgery_kernels.trim_limits([], experts, [0.5], names=["first", "second"])
