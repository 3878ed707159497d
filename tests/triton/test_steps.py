"""steps_out and steps_limits on CUDA tensors: the Triton kernels against the oracle and against the bits of the CPU."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from surgery_kernels.ops.steps import Code, Steps
from tests.cases import DTYPES, assert_same, bits, gaussian, grid, inputs, option_id
from tests.guards import Counted, assert_border_kept, guarded
from tests.ops.test_steps import REFUSED_PROGRAMS, shared_and_bits
from tests.programs import (
    AXES,
    eager_nearswap,
    inputs_of,
    nearswap,
    num_blocks,
    numbers_of,
    random_program,
    ranks_of,
    scaled_distance,
)

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

ops = torch.ops.surgery_kernels

SMALL_SHAPES = [(), (0,), (1,), (65,), (257,), (3, 0, 2), (0, 3), (3, 40), (7, 3, 5)]


@pytest.fixture(params=["constant", "in-memory"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where kernels have programs: only long ones are in memory otherwise."""
    from surgery_kernels.triton import steps_launch as steps

    if request.param == "in-memory":
        monkeypatch.setattr(steps, "LONGEST", 0)
        monkeypatch.setattr(steps, "MEMORY", 1 << 16)  # several launches
    yield request.param


def without_sums(program: list[int]) -> list[int]:
    kept = [i for i in range(0, len(program), 5) if program[i] not in (Code.SUM, Code.DOT)]
    return [word for i in kept for word in program[i : i + 5]]


def check(
    gpu: torch.device, tensors: list[Tensor], num_inputs: int, program: list[int], numbers: Tensor, **options: Any
) -> None:
    from surgery_kernels.triton.steps import steps_out

    shift = options.pop("shift", 0)
    expected, expected_sums = reference.steps(tensors, num_inputs, program, numbers, **options)
    moved = [guarded(x, gpu, shift) for x in tensors]
    out = [guarded(torch.full_like(x, math.nan), gpu, shift) for x in expected]
    sums = steps_out(moved, num_inputs, program, numbers, **options, out=out)
    for j, (x, wanted) in enumerate(zip(out, expected, strict=True)):
        assert_border_kept(x)
        assert_same(x.cpu(), wanted, f"output {j}, {options}")
    assert_same(sums.cpu(), expected_sums, f"sums, {options}")


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("seed", [2, 5, 9])
def test_programs_of_every_instruction(seed: int, dtype: torch.dtype, wide: bool, gpu: torch.device) -> None:
    program = random_program(seed, 3)
    tensors = inputs_of((4, 35), 3, dtype)
    axis = AXES[seed % 3]
    numbers = numbers_of(num_blocks((4, 35), axis), 4 * 35)
    check(gpu, tensors, 3, program, numbers, axis=axis, wide=wide)
    check(gpu, tensors, 3, without_sums(program), numbers, axis=axis, wide=wide)


def test_the_programs_have_every_instruction() -> None:
    assert {code for seed in (2, 5, 9) for code in random_program(seed, 3)[::5]} == set(Code) - {Code.BITS}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], axis: str, gpu: torch.device) -> None:
    program = random_program(73, 2, length=12)
    shift = len(shape) % 2
    tensors = inputs_of(shape, 2, (torch.float32, torch.bfloat16)[shift])
    check(gpu, tensors, 2, program, numbers_of(num_blocks(shape, axis), math.prod(shape)), axis=axis, shift=shift)
    for numbers in (numbers_of(num_blocks(shape, axis), math.prod(shape)), numbers_of(1, math.prod(shape))):
        check(gpu, tensors, 2, without_sums(program), numbers, axis=axis, shift=shift)


@pytest.mark.parametrize("axis", AXES)
def test_pieces_and_several_tensors(axis: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of pieces of fewer elements are those of whole blocks of the CPU, added up in the same order."""
    from surgery_kernels.triton import steps_launch as steps

    shapes: list[tuple[int, ...]] = [(130, 5), (0,), (), (4_100,), (2, 200)]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    tensors = [x for i, shape in enumerate(shapes) for x in inputs_of(shape, 2, dtypes[i % 3])]
    count = sum(num_blocks(shape, axis) for shape in shapes)
    program = without_sums(random_program(112, 2, length=12))
    kernel = Counted(steps._steps)
    monkeypatch.setattr(steps, "_steps", kernel)
    check(gpu, tensors, 2, program, numbers_of(count, 50), axis=axis)
    assert kernel.launches == 3  # one for each dtype
    check(gpu, tensors, 2, random_program(112, 2, length=12), numbers_of(count, 50), axis=axis)


def test_sums_of_many_pieces(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import steps, steps_launch

    monkeypatch.setattr(steps_launch, "SUM_BLOCK", 64)
    monkeypatch.setattr(steps_launch, "RUN", 3)
    program = Steps(2)
    program.dot(program.load(0), program.load(1)), program.sum(program.load(0))
    _, experts = inputs(gaussian, (11 * 64 + 7,), 2, torch.float32)
    blocks = zip(*(x.split(64) for x in experts), strict=True)
    expected = reference.sums.fold_halves(torch.stack([program.run(list(block))[0] for block in blocks], dim=1))
    assert_same(steps.steps_out(on(gpu, experts), 2, program.program, program.table([]), out=[])[0].cpu(), expected)
    _, experts = inputs(gaussian, (7, 35), 2, torch.float32)
    runs = zip(*(x.split(3) for x in experts), strict=True)
    of_runs = torch.stack([program.run(list(run), axis="column") for run in runs], dim=2)
    actual = steps.steps_out(on(gpu, experts), 2, program.program, program.table([]), "column", out=[])
    assert_same(actual.cpu(), reference.sums.fold_halves(of_runs))


def on(gpu: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    return [x.to(gpu) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_the_bits_of_the_cpu(dtype: torch.dtype, gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_out

    base, (other,) = inputs(gaussian, (9, 1_000), 1, dtype)
    steps = nearswap()
    merged, on_the_cpu = torch.empty_like(base, device=gpu), torch.empty_like(base)
    steps_out(on(gpu, [base, other]), 2, steps.program, steps.table([0.07]), out=[merged])
    steps.run([base, other], [0.07], out=[on_the_cpu])
    assert torch.equal(bits(merged.cpu()), bits(on_the_cpu))
    assert_same(merged.cpu(), eager_nearswap(base, other, 0.07))


@pytest.mark.usefixtures("kept")
def test_more_registers_than_a_gpu_has(gpu: torch.device) -> None:
    steps = Steps(64)
    loaded = [steps.load(i) for i in range(64)]
    mean = sum(loaded, 0.0) / 64.0
    steps.store(sum(((x - mean) * (x - mean) for x in loaded), 0.0))
    _, experts = inputs(gaussian, 200, 64, torch.bfloat16)
    check(gpu, experts, 64, steps.program, steps.table([]))


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("with_sums", [True, False], ids=["", "without sums"])
def test_bits(gpu: torch.device, with_sums: bool) -> None:
    from surgery_kernels.triton.steps import steps_out

    steps = shared_and_bits(2)
    program = steps.program if with_sums else without_sums(steps.program)
    for dtype in (torch.float64, torch.bfloat16):
        tensors = [x for shape in [*SMALL_SHAPES, (40_000,)] for x in inputs_of(shape, 2, dtype)]
        expected, sums = reference.steps(tensors, 2, program, steps.table([]))
        num_bytes = sum(x.numel() for x in expected if x.dtype == torch.uint8)
        moved, out, at = torch.full((num_bytes + 2,), 85, dtype=torch.uint8, device=gpu), [], 1
        for x in expected:
            packed = x.dtype == torch.uint8
            out.append(moved[at : at + x.numel()] if packed else torch.full_like(x, math.nan).to(gpu))
            at += x.numel() if packed else 0
        found = steps_out([x.to(gpu) for x in tensors], 2, program, steps.table([]), out=out)
        for j, (x, wanted) in enumerate(zip(out, expected, strict=True)):
            assert_same(x.cpu(), wanted, f"output {j}")
        assert_same(found.cpu(), sums)
        assert moved[0] == moved[-1] == 85


def test_refused_bits(gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_limits, steps_out

    steps, x = shared_and_bits(1), torch.zeros(4, 3, device=gpu)
    bits = [torch.zeros(2, dtype=torch.uint8, device=gpu) for _ in range(2)]
    for message, out, axis in (
        (
            "out must be contiguous uint8 [2] on the device of experts[0] for bits, got another tensor",
            [x, x.clone(), bits[1]],
            "tensor",
        ),
        ("axis must be 'tensor' for a program with bits, got 'row'", [bits[0], x.clone(), bits[1]], "row"),
    ):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            steps_out([x], 1, steps.program, steps.table([]), axis=axis, out=out)
    only_bits = Steps(1)
    only_bits.store_bits(only_bits.load(0))
    with pytest.raises(RuntimeError, match="^program must store its keys and nothing else, got 1 outputs and 0 sums$"):
        steps_limits([x], 1, only_bits.program, only_bits.table([]), [1])


@pytest.mark.usefixtures("kept")
def test_in_place(gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_out

    base, (other,) = inputs(gaussian, (40, 50), 1, torch.bfloat16)
    steps, expected = nearswap(), eager_nearswap(base, other, 0.07)
    for i in (0, 1):
        given = [x.clone().to(gpu) for x in (base, other)]
        steps_out(given, 2, steps.program, steps.table([0.07]), out=[given[i]])
        assert_same(given[i].cpu(), expected)
    turned = base.to(gpu).t().contiguous().t()
    steps_out([turned, other.to(gpu)], 2, steps.program, steps.table([0.07]), out=[turned])
    assert_same(turned.cpu(), expected)


def test_layouts(gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_out

    base, (other,) = inputs(gaussian, (31, 33), 1, torch.float32)
    moved = [x.to(gpu).t().contiguous().t() for x in (base, other)]
    out = torch.full((33, 62), 7.0, device=gpu)[:, ::2].t()
    steps_out(moved, 2, nearswap().program, nearswap().table([0.07]), out=[out])
    assert_same(out.cpu(), eager_nearswap(base, other, 0.07))


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, (20, 33)], ids=str)
def test_limits(shape: tuple[int, ...], axis: str, wide: bool, gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_limits

    program = scaled_distance().program
    count = num_blocks(shape, axis)
    ranks = ranks_of(math.prod(shape) // max(1, count))
    for dtype, numbers in itertools.product(DTYPES, (torch.ones(1, 1), torch.arange(1.0, count + 1)[:, None])):
        base, (expert,) = inputs(grid, shape, 1, dtype)
        if len(numbers):
            options = {"axis": axis, "wide": wide}
            given = (2, program, numbers.double(), ranks)
            expected = reference.steps_limits([base, expert], *given, **options)
            actual = steps_limits(on(gpu, [base, expert]), *given, **options)
            for x, wanted, what in zip(actual, expected, ("thresholds", "cuts"), strict=True):
                assert_same(x.cpu(), wanted, what)


@pytest.mark.parametrize("axis", AXES)
def test_limits_of_odd_numbers(axis: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_limits

    tensors = [x for shape in ((5, 40), (40,), (5, 4)) for x in inputs_of(shape, 2, torch.bfloat16)]
    given = (2, scaled_distance().program, torch.full((1, 1), 0.5).double(), [1, 4, -2], axis)
    for x, wanted in zip(steps_limits(on(gpu, tensors), *given), ops.steps_limits(tensors, *given), strict=True):
        assert_same(x.cpu(), wanted)


def test_limits_of_whole_tensors_with_numbers_of_rows(gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_limits

    base, (expert,) = inputs(gaussian, (30, 11), 1, torch.float32)
    numbers = torch.arange(1.0, 31)[:, None].double()
    given = (2, scaled_distance().program, numbers, [1, 37, -50], "row", False, True)
    for x, wanted in zip(
        steps_limits(on(gpu, [base, expert]), *given), ops.steps_limits([base, expert], *given), strict=True
    ):
        assert_same(x.cpu(), wanted)


def test_limits_of_large_vectors(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut may lie anywhere between two ties."""
    from surgery_kernels.triton import steps as module

    monkeypatch.setattr(module, "LARGE", 20)
    base, (expert,) = inputs(grid, (3, 300), 1, torch.float32)
    steps, ranks = scaled_distance(), [1, 37, 150, 300, -1, -120, 0]
    given = (2, steps.program, steps.table([0.3]), ranks, "row")
    thresholds, cuts = (x.cpu() for x in module.steps_limits(on(gpu, [base, expert]), *given))
    expected, expected_cuts = ops.steps_limits([base, expert], *given)
    assert_same(thresholds, expected)
    keys = (base - expert).abs() * 0.3
    for row, i in itertools.product(range(3), range(len(ranks))):
        places = torch.arange(300) + 300 * row
        ties = keys[row] == expected[row, i]
        assert torch.equal(ties & (places < cuts[row, i]), ties & (places < expected_cuts[row, i]))


@pytest.mark.parametrize(("message", "program"), REFUSED_PROGRAMS, ids=str)
def test_refused_programs(message: str, program: list[int], gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_out

    zeros = torch.zeros(3, device=gpu)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        steps_out([zeros, zeros], 2, program, torch.zeros(1, 1).double(), out=[torch.zeros_like(zeros)])


STORE = [Code.LOAD, 0, 0, 0, 0, Code.STORE, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"axis": "rows"}, ValueError, "axis must be one of 'tensor', 'row', 'column', got 'rows'"),
        ({"num_inputs": 2}, RuntimeError,
         "inputs must be num_inputs tensors for every tensor that is computed, got 1 for 2"),
        ({"numbers": torch.zeros(1, 1)}, RuntimeError,
         "numbers must be float64 [num_blocks, num_numbers], got another dtype or shape"),
        ({"numbers": torch.zeros(3, 1).double()}, RuntimeError, "numbers must be of 1 block or of 4, got 3"),
        ({"numbers": torch.zeros(1, 1, device="meta").double()}, RuntimeError,
         "numbers must be on the CPU or on {device}, got meta"),
        ({"out": []}, RuntimeError, "out must be 1 for every tensor that is computed, got 0 for 1"),
        ({"program": [*STORE, Code.LOAD, 1, 0, 0, 0], "in_place": True}, RuntimeError,
         "program must load before it stores where out is an input, got a load after a store"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(change: dict[str, Any], error: type[Exception], message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_out

    x = torch.zeros(4, 3, device=gpu)
    out = [x if change.pop("in_place", False) else torch.zeros_like(x)]
    call = {"num_inputs": 1, "program": STORE, "numbers": torch.zeros(1, 1).double(), "axis": "row", "out": out}
    with pytest.raises(error, match=f"^{re.escape(message.format(device=x.device))}$"):
        steps_out([x], **{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": []}, "ranks must be at least one, got none"),
        ({"axis": "column", "whole": True}, "whole must be False by column, got True"),
        ({"ranks": [13]}, "ranks must be in [-12, 12], the number of entries, got 13"),
        ({"program": [*STORE, Code.SUM, 0, 0, 0, 0]},
         "program must store its keys and nothing else, got 1 outputs and 1 sums"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_limits(change: dict[str, Any], message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.steps import steps_limits

    call = {"program": STORE, "numbers": torch.zeros(1, 1).double(), "ranks": [1], **change}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        steps_limits([torch.zeros(4, 3, device=gpu)], 1, **call)
