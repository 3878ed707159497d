"""ties_merge where it reads its inputs once: assumed limits, whose wrong decisions are corrected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import _C, reference, ties_merge
from tests.cases import (
    DTYPES,
    KINDS,
    Inputs,
    assert_same,
    bits,
    cancelling,
    densities_of,
    gaussian,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    merge_options,
    option_id,
    rows,
    weights_of,
    with_weights,
)

SEVERAL_CHUNKS = 50_003  # of the kernels on the CPU: shared out among threads, and past the size that has no sample
OPTIONS: list[dict[str, Any]] = [
    {"lam": 0.3},
    {"reduce": "max", "density": [0.2, 1.0, 0.01], "elect": "count"},
    {"semantics": "mergekit", "weights": weights_of(3), "lam": -0.7},
    {"semantics": "exact", "elect": "none", "density": 0.5},
    {"semantics": "peft", "weights": weights_of(3), "density": 0.57},
]


@pytest.fixture(autouse=True)
def reading_once() -> Iterator[None]:
    before = _C.set_one_read_from(0)
    yield
    _C.set_one_read_from(before)


def check(base: Tensor | None, experts: list[Tensor], what: str = "", **options: Any) -> None:
    expected = reference.ties_merge(base, experts, **options)
    assert_same(ties_merge(base, experts, **options), expected, f"{what} {options}")


def in_two_reads(base: Tensor | None, experts: list[Tensor], **options: Any) -> Tensor:
    before = _C.set_one_read_from(2**62)
    try:
        return ties_merge(base, experts, **options)
    finally:
        _C.set_one_read_from(before)


@pytest.mark.any_isa
def test_from_which_size_on() -> None:
    """The first chunk is written before the last is read."""
    expert = torch.ones(SEVERAL_CHUNKS)
    expert[-1] = math.nan
    for size, is_written in ((expert.nbytes, True), (expert.nbytes + 1, False)):
        _C.set_one_read_from(size)
        out = torch.zeros_like(expert)
        with pytest.raises(RuntimeError, match=r"^experts\[0\] must be finite, got 1 NaN or infinite values$"):
            torch.ops.surgery_kernels.ties_merge_out([], [expert], [0.5], out=[out])
        assert bool(out[0] == 1) == is_written


@pytest.mark.any_isa
def test_given_outputs_are_untouched_by_an_error() -> None:
    expert = torch.ones(SEVERAL_CHUNKS)
    expert[-1] = math.nan
    out = torch.zeros_like(expert)
    with pytest.raises(RuntimeError, match=r"^experts\[0\] must be finite, got 1 NaN or infinite values$"):
        ties_merge(None, [expert], density=0.5, out=out)
    assert not out.any()


@pytest.mark.parametrize("options", [o for o in merge_options() if not o.get("rescale")], ids=option_id)
def test_every_option(options: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (gaussian, leaning_up):
            base, experts = inputs(kind, 2_503, 4, dtype)
            check(base, experts, kind.__name__, density=0.5, lam=-0.3, **with_weights(options, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    """In several chunks; without a base, and with it."""
    base, experts = inputs(kind, SEVERAL_CHUNKS, 3, dtype)
    for options in OPTIONS[: 2 if dtype.itemsize > 2 else 3]:
        check(base if "lam" in options else None, experts, **options)


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 33])
def test_every_number_of_experts(num_tasks: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(gaussian, 3_001, num_tasks, dtype)
        check(base, experts, density=densities_of(num_tasks), lam=0.3)
        check(base, experts, density=densities_of(num_tasks), weights=weights_of(num_tasks), semantics="mergekit")


@pytest.mark.parametrize("density", [0.005, 0.3, 0.9])
@pytest.mark.parametrize("kind", [cancelling, leaning_up, leaning_down], ids=option_id)
def test_draws_take_the_sign_of_the_scope(kind: Any, density: float) -> None:
    """Corrected elements are drawn, and were; chunks have more draws than are recorded, and fewer."""
    base, experts = inputs(kind, SEVERAL_CHUNKS, 4, torch.float32)
    scarce = [torch.where(torch.arange(SEVERAL_CHUNKS) % 97 == 0, expert, 0) for expert in experts]
    check(base, experts, density=density)
    check(None, scarce, density=density, elect="count", reduce="max")


def test_one_late_element_decides_every_draw() -> None:
    experts = [torch.full((60_000,), 0.5), torch.full((60_000,), -0.25), torch.full((60_000,), -0.25)]
    for late in (0.75, -0.75):
        experts[0][-1] = late
        check(None, experts, density=0.9999)


@pytest.mark.parametrize("semantics", ["paper", "mergekit", "peft"])
def test_ties_where_only_their_number_is_known(semantics: str) -> None:
    """Copies of one magnitude that would swamp the others are counted: chunks that they decide are merged again."""
    g = torch.Generator().manual_seed(0)
    count = 100_001
    for share in (0.1, 0.2003, 0.3):
        experts = []
        for _ in range(2):
            x = torch.rand(count, generator=g) / 2
            x[torch.rand(count, generator=g) < 0.2] += 0.75
            x[torch.rand(count, generator=g) < 0.2] = 0.625
            experts.append(x * (torch.randint(0, 2, (count,), generator=g) * 2 - 1))
        check(None, experts, density=[share, 0.2], semantics=semantics)


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_values(dtype: torch.dtype, nonfinite: str) -> None:
    base, experts = inputs(gaussian, 5_000, 3, dtype)
    experts[0][[1, 10, 20]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    experts[2][[10, 30]] = torch.tensor([-math.inf, math.inf], dtype=dtype)
    for semantics in ("paper", "mergekit", "peft"):
        for density in (0.2, 1.0, 1e-9, [1 / 5000, 2 / 5000, 0.2]):
            check(base, experts, semantics=semantics, nonfinite=nonfinite, density=density)


@pytest.mark.usefixtures("forced_histogram")
def test_brackets_that_miss() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(rows, SEVERAL_CHUNKS, 3, dtype)
        for options in OPTIONS:
            check(base, experts, **options)


def test_more_inside_than_is_kept() -> None:
    """Two magnitudes far from all others, one ulp apart: every bracket holds all of them, and none is counted alone."""
    count = 4_000_001
    steps = torch.arange(count, dtype=torch.int32) * 7919 % 4001
    x = (steps + 0x3F800000).view(torch.float32)  # 4001 neighbouring numbers
    for semantics in ("paper", "mergekit"):
        merged = ties_merge(None, [x], density=0.5, semantics=semantics)
        assert_same(merged, in_two_reads(None, [x], density=0.5, semantics=semantics))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, leaning_down], ids=option_id)
def test_several_tensors_are_one_scope(kind: Any, dtype: torch.dtype) -> None:
    sizes = [2_000, 1, 0, 4_099, 231, 17_000]
    base, experts = inputs(kind, sum(sizes), 4, dtype)
    density = [0.2, 0.9, 0.05, 1.0]
    by_tensor = list(zip(*(expert.split(sizes) for expert in experts), strict=True))
    for semantics in ("paper", "mergekit", "peft"):
        out = [torch.full_like(part, math.nan) for part in base.split(sizes)]
        torch.ops.surgery_kernels.ties_merge_out(
            list(base.split(sizes)), [x for tensor in by_tensor for x in tensor], density, semantics=semantics, out=out
        )
        expected = reference.ties_merge(base, experts, density=density, semantics=semantics)
        assert_same(torch.cat(out), expected, semantics)


def test_several_dtypes_in_one_scope() -> None:
    problems = [inputs(grid, 20_001, 2, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
    for semantics in ("paper", "mergekit"):
        expected = reference.scope_merge(
            bases, list(zip(*experts, strict=True)), density=[0.2, 0.6], semantics=semantics
        )
        out = [torch.empty_like(base) for base in bases]
        torch.ops.surgery_kernels.ties_merge_out(
            bases, [x for tensor in experts for x in tensor], [0.2, 0.6], semantics=semantics, out=out
        )
        for merged, one in zip(out, expected, strict=True):
            assert_same(merged, one, semantics)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Inputs, dict[str, Any]]:
    dtype = draw(st.sampled_from(DTYPES))
    num_tasks, count = draw(st.integers(1, 4)), draw(st.integers(1_100, 3_000))
    base, experts = inputs(draw(st.sampled_from(KINDS)), count, num_tasks, dtype)
    options = dict(draw(st.sampled_from([o for o in merge_options() if not o.get("rescale")])))
    if options.get("weights"):
        options["weights"] = draw(st.lists(st.floats(-2, 2), min_size=num_tasks, max_size=num_tasks))
    shares = st.sampled_from([1e-9, 0.01, 0.2, 0.5, 0.99, 1.0])
    options["density"] = draw(st.lists(shares, min_size=num_tasks, max_size=num_tasks))
    return (base, experts), options


@given(problem=problems(), with_base=st.booleans())
def test_any_problem(problem: tuple[Inputs, dict[str, Any]], with_base: bool) -> None:
    (base, experts), options = problem
    check(base if with_base else None, experts, **options)


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_threads", "restored_isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_threads_and_instruction_sets(dtype: torch.dtype) -> None:
    for kind in (gaussian, leaning_up):
        base, experts = inputs(kind, SEVERAL_CHUNKS, 3, dtype)
        for options in OPTIONS:
            expected = bits(in_two_reads(base, experts, **options))
            for threads, isa in enumerate(_C.isas(), 1):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                assert torch.equal(bits(ties_merge(base, experts, **options)), expected), f"{isa}, {threads}"
