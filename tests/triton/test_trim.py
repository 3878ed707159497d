"""Thresholds on CUDA tensors: the Triton kernels against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import (
    DTYPES,
    KINDS,
    SEMANTICS,
    SHAPES,
    assert_same,
    densities_of,
    equal,
    gaussian,
    grid,
    inputs,
    option_id,
    sparse,
)
from tests.guards import guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

SAMPLED = 1000  # elements from which a test has the first range sampled


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import trim

    monkeypatch.setattr(trim, "DIRECT", SAMPLED)


def thresholds(gpu: torch.device, base: Tensor | None, experts: list[Tensor], shift: int = 0, **options: Any) -> Tensor:
    from surgery_kernels.triton.trim import trim_thresholds

    base = None if base is None else guarded(base, gpu, shift)
    return trim_thresholds(base, [guarded(expert, gpu, shift) for expert in experts], **options).cpu()


def check(gpu: torch.device, base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    expected = reference.trim_thresholds(base, experts, **options)
    assert_same(thresholds(gpu, base, experts, **options), expected, str(options))


def check_limits(gpu: torch.device, bases: list[Tensor], experts: list[Tensor], **options: Any) -> None:
    """What the limits keep is what the CPU's keep: a cut may lie anywhere between two ties."""
    from surgery_kernels.triton.trim import trim_limits

    num_tasks = len(options["density"])
    limits = trim_limits([x.to(gpu) for x in bases], [x.to(gpu) for x in experts], **options)
    expected = torch.ops.surgery_kernels.trim_limits(bases, experts, **options)
    compute = limits[0].dtype
    for t in range(num_tasks):
        task_vectors = [
            (expert.to(compute) - base.to(compute)).to(base.dtype)
            for base, expert in zip(bases, experts[t::num_tasks], strict=True)
        ]
        keys = torch.cat([x.reshape(-1).abs().to(compute) for x in task_vectors])
        kept = [
            (keys > threshold[t]) | ((keys == threshold[t]) & (torch.arange(len(keys)) < cut[t]))
            for threshold, cut in ([x.cpu() for x in limits], expected)
        ]
        assert torch.equal(*kept), f"{options}, expert {t}"


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(kind, 257, 3, dtype)
    check(gpu, base, experts, density=[0.2, 1.0, 0.003])
    check(gpu, None, experts, density=[0.9, 0.5, 1e-9], semantics="peft")


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data_through_a_sample(kind: Any, gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(kind, 5_001, 2, dtype)
        check(gpu, base, experts, density=[0.2, 0.9])


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, shape, 1, dtype)
    assert_same(
        thresholds(gpu, base, experts, shift=1, density=[0.3], semantics="mergekit"),
        reference.trim_thresholds(base, experts, density=[0.3], semantics="mergekit"),
    )


@pytest.mark.parametrize("num_tasks", [1, 8, 20, 33])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, 65, num_tasks, torch.bfloat16)
    check(gpu, base, experts, density=densities_of(num_tasks))


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("first", [0.0, 0.5, 1.5], ids=["below", "around", "above"])
def test_a_range_that_misses_the_threshold_is_corrected(
    first: float, dtype: torch.dtype, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import trim
    from surgery_kernels.triton.trim_rounds import LAST, THRESHOLD

    base, experts = inputs(gaussian, 3_000, 2, dtype)
    experts = [expert - base for expert in experts]
    start = trim.start_from_sample

    def misled(scope: Any, state: Tensor, *rest: Any) -> None:
        start(scope, state, *rest)
        compute = scope.compute
        around = reference.trim_thresholds(None, experts, density=0.2).to(compute) * first
        keys = around.to(dtype).to(compute).view(torch.int64 if scope.wide else torch.int32).to(torch.int64)
        state[:, LAST.value] -= state[:, THRESHOLD.value] - keys.to(gpu)
        state[:, THRESHOLD.value] = keys.to(gpu)

    monkeypatch.setattr(trim, "start_from_sample", misled)
    check(gpu, None, experts, density=[0.2, 0.2])


LISTED = [gaussian, sparse]  # with few and with many keys in the range


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("kind", LISTED, ids=option_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=option_id)
def test_lists_that_are_too_short(
    kind: Any, dtype: torch.dtype, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import trim_lists, trim_rounds

    monkeypatch.setattr(trim_rounds, "PROGRAMS", 2)  # which go through several pieces
    for share in (1, 100, 10_000):
        monkeypatch.setattr(trim_lists, "SHARE", share)
        base, experts = inputs(kind, 3_300, 2, dtype)
        check(gpu, base, experts, density=[0.2, 0.9])


@pytest.mark.usefixtures("sampled")
def test_tensors_are_read_once(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import trim, trim_lists

    monkeypatch.setattr(trim_lists, "SHARE", 1)
    base, experts = inputs(gaussian, 20_001, 2, torch.float32)
    moved = [x.clone().to(gpu) for x in (base, *experts)]
    list_keys = trim.list_keys

    def listed(*arguments: Any) -> Tensor:
        lists = list_keys(*arguments)
        for x in moved:
            x.fill_(7.0)
        return lists

    monkeypatch.setattr(trim, "list_keys", listed)
    found = trim.trim_thresholds(moved[0], moved[1:], [0.2, 0.6])
    assert_same(found.cpu(), reference.trim_thresholds(base, experts, density=[0.2, 0.6]))


@pytest.mark.usefixtures("sampled")
def test_ties_at_zero_below_a_range_that_starts_at_the_smallest_number(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import trim
    from surgery_kernels.triton.trim_rounds import LAST, SHIFT, THRESHOLD

    def misled(scope: Any, state: Tensor, *_: object) -> None:
        state[:, THRESHOLD.value], state[:, LAST.value], state[:, SHIFT.value] = 1, 1000, 0

    monkeypatch.setattr(trim, "start_from_sample", misled)
    base, experts = inputs(sparse, 3_000, 2, torch.float32)
    check_limits(gpu, [base], experts, density=[0.5, 0.3], semantics="mergekit")


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_limits_of_several_tensors(dtype: torch.dtype, semantics: str, gpu: torch.device) -> None:
    for kind in (grid, equal):
        bases, experts = [], []
        for size in (40, 0, 4_200, 7):
            base, of_tensor = inputs(kind, size, 3, dtype)
            bases.append(base)
            experts += of_tensor
        check_limits(gpu, bases, experts, density=[0.3, 0.77, 1.0], semantics=semantics)


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_limits_of_several_dtypes(semantics: str, gpu: torch.device) -> None:
    bases, experts = [], []
    for i, size in enumerate((300, 4_100, 20, 65, 500)):
        base, of_tensor = inputs(grid, size, 2, (torch.bfloat16, torch.float32, torch.float16)[i % 3])
        bases.append(base)
        experts += of_tensor
    check_limits(gpu, bases, experts, density=[0.3, 0.05], semantics=semantics)


def check_ranks(
    gpu: torch.device, bases: list[Tensor], experts: list[Tensor], num_tasks: int, ranks: list[int], **options: Any
) -> None:
    """The sets that the limits describe are those of stable sorts: a cut may lie anywhere between two ties."""
    from surgery_kernels.triton.trim import trim_limits

    arguments = [x.to(gpu) for x in bases], [x.to(gpu) for x in experts], [0.1] * num_tasks
    thresholds, cuts = (x.cpu() for x in trim_limits(*arguments, ranks=ranks * num_tasks, **options))
    expected, _ = torch.ops.surgery_kernels.trim_limits(
        bases, experts, [0.1] * num_tasks, ranks=ranks * num_tasks, **options
    )
    assert_same(thresholds, expected)
    by_expert = [experts[t::num_tasks] for t in range(num_tasks)]
    keys = reference.scope_keys(reference.load_scope(bases, by_expert, options.get("nonfinite", "error"), None))
    for i, rank in enumerate(ranks * num_tasks):
        of_expert, threshold = keys[i // len(ranks)], thresholds[i]
        same = (of_expert == threshold) | (of_expert.isnan() & threshold.isnan())  # NaN is the largest
        above = (of_expert > threshold) | (of_expert.isnan() & ~same)
        described = (above if rank >= 0 else ~above & ~same) | (same & (torch.arange(len(of_expert)) < cuts[i]))
        assert torch.equal(described, reference.ranked_entries(of_expert, rank)), f"rank {rank}"


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, sparse, equal], ids=option_id)
def test_limits_of_several_ranks(kind: Any, dtype: torch.dtype, gpu: torch.device) -> None:
    bases, experts = [], []
    for size in (40, 0, 4_200):
        base, of_tensor = inputs(kind, size, 2, dtype)
        bases.append(base)
        experts += of_tensor
    check_ranks(gpu, bases, experts, 2, [0, 1, 1_300, 4_240, -1, -100, -4_240])


def test_ranks_over_several_dtypes(gpu: torch.device) -> None:
    bases, experts = [], []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        base, of_tensor = inputs(grid, 500, 2, dtype)
        bases.append(base)
        experts += of_tensor
    check_ranks(gpu, bases, experts, 2, [700, 30, -30, -700])


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_ranks_of_nonfinite_values(nonfinite: str, gpu: torch.device) -> None:
    base, experts = inputs(grid, (10, 100), 1, torch.float32)
    moved = experts[0].t().contiguous().t()
    moved[0, [5, 77, 50]] = torch.tensor([math.nan, math.inf, -math.inf])
    check_ranks(gpu, [base], [moved], 1, [1, 2, 4, 990, -3, -998, -999, -1_000], nonfinite=nonfinite)


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=option_id)
def test_ranks_where_many_share_the_largest_key(dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(grid, 2_000, 1, dtype)
    experts[0][::3] = math.nan
    check_ranks(gpu, [base], experts, 1, [1, 300, 650, 667, 668, -1, -1_334, -1_500], nonfinite="propagate")


def test_ranks_that_are_refused(gpu: torch.device) -> None:
    from surgery_kernels.triton.trim import trim_limits

    experts = [torch.zeros(5, device=gpu)] * 2
    with pytest.raises(RuntimeError, match=r"^ranks must be in \[-5, 5\], the number of entries, got 6$"):
        trim_limits([], experts, [0.5] * 2, ranks=[1, 6])
    with pytest.raises(RuntimeError, match=r"^ranks must be as many for every expert \(2\), got 3$"):
        trim_limits([], experts, [0.5] * 2, ranks=[1, 2, 3])
    experts[1] = torch.full((5,), math.nan, device=gpu)
    with pytest.raises(RuntimeError, match=r"^experts\[1\] must be finite, got 5 NaN or infinite values$"):
        trim_limits([], experts, [0.5] * 2, ranks=[1, 2, 0, 0])


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_nonfinite_values_are_ranked_or_dropped(nonfinite: str, gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, 1_500, 2, dtype)
        experts[0][::5] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(100).to(dtype)
        for density in (0.1, 0.25):
            check(gpu, base, experts, density=[density] * 2, nonfinite=nonfinite)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_nonfinite_values_are_an_error(density: float, gpu: torch.device) -> None:
    base, experts = inputs(grid, 300, 2, torch.float32)
    experts[1][7] = math.inf
    with pytest.raises(RuntimeError, match=r"^experts\[1\] must be finite, got 1 NaN or infinite values$"):
        thresholds(gpu, base, experts, density=[density] * 2)


def test_refused(gpu: torch.device) -> None:
    experts = [torch.zeros(10)] * 2
    with pytest.raises(RuntimeError, match=r"^experts must be at least one tensor, got none$"):
        thresholds(gpu, None, [], density=[])
    with pytest.raises(RuntimeError, match=r"^density must be one number per expert \(2\), got 1$"):
        thresholds(gpu, None, experts, density=[0.2])
    with pytest.raises(ValueError, match=r"^semantics must be one of .*, got 'mine'$"):
        thresholds(gpu, None, experts, density=[0.2] * 2, semantics="mine")
    with pytest.raises(ValueError, match=r"^nonfinite must be one of .*, got 'keep'$"):
        thresholds(gpu, None, experts, density=[0.2] * 2, nonfinite="keep")
    with pytest.raises(RuntimeError, match=r"^experts must be all float64 or none within one scope, got both$"):
        from surgery_kernels.triton.trim import trim_limits

        trim_limits([], [experts[0].to(gpu), experts[0].to(gpu).double()], [0.2])
