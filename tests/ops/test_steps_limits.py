"""steps_limits, the order statistics of what a program stores, against the oracle and against trim_limits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, reference
from surgery_kernels.ops.steps import Steps
from tests.cases import DTYPES, KINDS, SHAPES, assert_same, bits, equal, gaussian, grid, inputs, option_id, rows
from tests.programs import AXES, inputs_of, num_blocks, ranks_of, scaled_distance

steps_limits = torch.ops.surgery_kernels.steps_limits


def compare(tensors: list[Tensor], program: list[int], numbers: Tensor, ranks: Sequence[int], **options: Any) -> None:
    expected = reference.steps_limits(tensors, 2, program, numbers, ranks, **options)
    actual = steps_limits(tensors, 2, program, numbers, ranks, **options)
    for x, wanted, what in zip(actual, expected, ("thresholds", "cuts"), strict=True):
        assert_same(x, wanted, f"{what} of {tuple(tensors[0].shape)}, {options}")


@pytest.mark.any_isa  # test_determinism and the tests of trim compare them
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [*zip(DTYPES, (False, False, True, False), strict=True), (torch.float32, True)],
    ids=option_id,
)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 70), (70, 40), (3, 2, 50), (70_003,), (2, 66_000)], ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, axis: str, wide: bool) -> None:
    base, (expert,) = inputs(grid, shape, 1, dtype)
    count = num_blocks(shape, axis)
    if count > 20_000:  # the oracle sorts each of them
        return
    size = math.prod(shape) // max(1, count)
    for numbers in (torch.ones(1, 1), torch.arange(1.0, count + 1)[:, None]):
        compare([base, expert], scaled_distance().program, numbers.double(), ranks_of(size), axis=axis, wide=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_the_limits_of_trim(kind: Any, dtype: torch.dtype) -> None:
    """The same key in the same compute type; of 16 bits that of rounded differences."""
    base, (expert,) = inputs(kind, 100_003, 1, dtype)
    steps = Steps(2)
    steps.store(steps.load(1) - steps.load(0))
    ranks = [1, 300, 20_003, 100_003, -1, -300, -20_003, 0]
    wanted = torch.ops.surgery_kernels.trim_limits([base], [expert], [1.0], ranks=ranks)
    for x, expected in zip(steps.limits([base, expert], ranks), wanted, strict=True):
        assert_same(x, expected[None])


@pytest.mark.usefixtures("forced_histogram")
@pytest.mark.parametrize("kind", [gaussian, grid, equal, rows], ids=option_id)
def test_by_the_histogram(kind: Any) -> None:
    base, (expert,) = inputs(kind, 100_003, 1, torch.float32)
    compare([base, expert], scaled_distance().program, torch.full((1, 1), 0.3).double(), [1, 300, 20_003, -300])


def test_edges() -> None:
    for dtype in DTYPES:
        for shape in ((3_000,), (70_001,), (30, 100)):
            tensors = inputs_of(shape, 2, dtype)
            compare(tensors, scaled_distance().program, torch.full((1, 1), 0.5).double(), [1, 50, 2_000, -1, -70])


def test_several_tensors() -> None:
    tensors = [x for shape in ((50, 40), (66_000,), (50,)) for x in inputs_of(shape, 2, torch.bfloat16)]
    for axis in ("tensor", "row"):
        count = sum(num_blocks(x.shape, axis) for x in tensors[::2])
        numbers = torch.arange(1.0, count + 1)[:, None].double()
        compare(tensors, scaled_distance().program, numbers, [1, 30, -2], axis=axis)


@pytest.mark.parametrize("axis", AXES)
def test_as_many_are_within_as_the_rank_says(axis: str) -> None:
    base, (expert,) = inputs(grid, (60, 80), 1, torch.float16)
    steps = scaled_distance()
    ranks = [33, -20]
    thresholds, cuts = steps.limits([base, expert], ranks, [1.0], axis=axis)
    counting = Steps(2)
    with counting.exact():
        key = abs(counting.load(0) - counting.load(1))
    threshold = counting.number(2)
    counting.sum(key.within(0))
    counting.sum((key < threshold) + key.equals(threshold) * key.within(2))
    limits = torch.stack([thresholds.double(), cuts.double()], dim=2).flatten(1)
    assert counting.run([base, expert], limits, axis=axis).unique(dim=0).tolist() == [[33.0, 20.0]]


def test_whole_tensors_with_numbers_of_rows() -> None:
    shapes = [(50, 40), (3, 30_000), (50,), (70_000, 1), (0, 3)]
    tensors = [x for shape in shapes for x in inputs(grid, shape, 2, torch.bfloat16)[1]]
    count = sum(num_blocks(x.shape, "row") for x in tensors[::2])
    for numbers in (torch.ones(1, 1), torch.arange(1.0, count + 1)[:, None]):
        options = {"axis": "row", "whole": True}
        compare(tensors[:8], scaled_distance().program, numbers.double(), [1, 30, -2, 0], **options)
        compare(tensors[8:], scaled_distance().program, numbers[:1].double(), [0], **options)


def test_limits_of_a_program_with_limits_of_its_own() -> None:
    """Places count within the tensor, in rows and in pieces too."""
    x = torch.randint(0, 9, (2, 70_000), generator=torch.Generator().manual_seed(0)).float()
    steps = Steps(2)
    a = steps.load(0)
    steps.store(a.within(0) * (a + 1.0))
    numbers = torch.tensor([[4.0, 30_000, 1.0], [4.0, 100_000, 1.0]], dtype=torch.float64)
    compare([x, x], steps.program, numbers, [1, 20_000, -65_000], axis="row")


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
def test_determinism() -> None:
    for shape in ((300_007,), (300, 1_007)):
        base, (expert,) = inputs(gaussian, shape, 1, torch.bfloat16)
        for axis in AXES:
            results = []
            for isa in _C.isas():
                for threads in (1, 2, 3, 7):
                    _C.set_isa(isa)
                    torch.set_num_threads(threads)
                    results.append(scaled_distance().limits([base, expert], [1, 77, 150, -9], [0.3], axis=axis))
            for thresholds, cuts in results[1:]:
                assert torch.equal(bits(thresholds), bits(results[0][0]))
                assert torch.equal(cuts, results[0][1])


A, B = torch.zeros(4, 3), torch.ones(4, 3)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("ranks must be in [-12, 12], the number of entries, got 13", {"ranks": [1, 13]}),
        ("ranks must be in [-3, 3], the number of entries, got -4", {"ranks": [-4], "axis": "row"}),
        ("ranks must be at least one, got none", {"ranks": []}),
        ("whole must be False by column, got True", {"whole": True, "axis": "column"}),
        ("inputs must be all float64 or none, got both", {"inputs": [A, B, A.double(), B.double()]}),
        ("numbers must be of 1 block or of 4, got 2", {"numbers": torch.zeros(2, 1), "axis": "row"}),
    ],
    ids=str,
)
def test_refused(message: str, call: dict[str, Any]) -> None:
    arguments = {"inputs": [A, B], "ranks": [1], "numbers": [1.0], **call}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        scaled_distance().limits(arguments.pop("inputs"), arguments.pop("ranks"), **arguments)


@pytest.mark.any_isa
def test_programs_that_are_no_key() -> None:
    steps = scaled_distance()
    steps.sum(steps.load(0))
    with pytest.raises(
        ValueError, match=r"^the program must store its keys and nothing else, got 1 outputs and 1 sums$"
    ):
        steps.limits([A, B], [1], [1.0])
    numbers = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^program must store its keys and nothing else, got 1 outputs and 1 sums$"):
        steps_limits([A, B], 2, steps.program, numbers, [1])


@pytest.mark.any_isa
@pytest.mark.parametrize("axis", AXES)
def test_opcheck(axis: str) -> None:
    tensors = [x for shape in ((10, 7), (33,)) for x in inputs(gaussian, shape, 2, torch.float32)[1]]
    numbers = torch.ones(1, 1, dtype=torch.float64)
    torch.library.opcheck(steps_limits, (tensors, 2, scaled_distance().program, numbers, [3, -2]), {"axis": axis})
