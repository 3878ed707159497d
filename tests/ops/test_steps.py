"""steps_out, and the programs that are built for it, against the oracle and against eager PyTorch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, reference
from surgery_kernels.ops.masks import unpack
from surgery_kernels.ops.steps import Code, Steps
from tests.cases import DTYPES, NUM_TASKS, SHAPES, assert_same, bits, gaussian, grid, inputs, option_id
from tests.programs import AXES, eager_nearswap, inputs_of, nearswap, num_blocks, numbers_of, random_program

steps_out = torch.ops.surgery_kernels.steps_out


def compare(tensors: list[Tensor], num_inputs: int, program: list[int], numbers: Tensor, **options: Any) -> None:
    expected, expected_sums = reference.steps(tensors, num_inputs, program, numbers, **options)
    out = [
        torch.full_like(x, math.nan if x.is_floating_point() else 255, memory_format=torch.contiguous_format)
        for x in expected
    ]
    sums = steps_out(tensors, num_inputs, program, numbers, **options, out=out)
    for j, (x, wanted) in enumerate(zip(out, expected, strict=True)):
        assert_same(x, wanted, f"output {j}, {options}")
    assert_same(sums, expected_sums, f"sums, {options}")


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("seed", range(12))
def test_programs_of_every_instruction(seed: int, dtype: torch.dtype, wide: bool) -> None:
    program = random_program(seed, 3)
    for axis in AXES:
        tensors = inputs_of((9, 71), 3, dtype)
        numbers = numbers_of(num_blocks((9, 71), axis), 9 * 71)
        compare(tensors, 3, program, numbers, axis=axis, wide=wide)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 70), (70, 600), (2, 600, 3), (9_000, 3), (2, 40_000)], ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, axis: str) -> None:
    program = random_program(90, 2, length=24)
    assert Code.FMA not in program[::5]  # of which the oracle takes one element at a time
    tensors = inputs_of(shape, 2, dtype)
    count = num_blocks(shape, axis)
    compare(tensors, 2, program, numbers_of(count, math.prod(shape)), axis=axis)
    compare(tensors, 2, program, numbers_of(1, math.prod(shape)), axis=axis)


def test_several_tensors() -> None:
    shapes: list[tuple[int, ...]] = [(40, 30), (0,), (), (7,), (3, 0, 2), (2, 3, 50), (32_801,), (1, 513)]
    for axis, dtypes in itertools.product(AXES, (DTYPES[:1], DTYPES[1:])):
        tensors = [x for i, shape in enumerate(shapes) for x in inputs_of(shape, 2, dtypes[i % len(dtypes)])]
        count = sum(num_blocks(shape, axis) for shape in shapes)
        for numbers in (numbers_of(1, 50), numbers_of(count, 50)):
            compare(tensors, 2, random_program(144, 2, length=24), numbers, axis=axis)
            compare(tensors, 2, random_program(149, 2, length=24), numbers, axis=axis, wide=True)


@pytest.mark.parametrize("num_inputs", NUM_TASKS)
def test_every_number_of_inputs(num_inputs: int) -> None:
    """Two passes over all of them, as a variance takes: as many registers as inputs."""
    steps = Steps(num_inputs)
    loaded = [steps.load(i) for i in range(num_inputs)]
    mean = sum(loaded, 0.0) / float(num_inputs)
    steps.store(sum(((x - mean) * (x - mean) for x in loaded), 0.0))
    for x in loaded:
        steps.dot(x, mean)
    for dtype in DTYPES:
        _, experts = inputs(gaussian, 1_100, num_inputs, dtype)
        numbers = torch.tensor([[0.0, float(num_inputs)]], dtype=torch.float64)
        compare(experts, num_inputs, steps.program, numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_the_roundings_of_torch(dtype: torch.dtype) -> None:
    base, (other,) = inputs(gaussian, 20_001, 1, dtype)
    merged = torch.empty_like(base)
    nearswap().run([base, other], [0.07], out=[merged])
    assert_same(merged, eager_nearswap(base, other, 0.07))


def test_exact_results_are_not_rounded_in_between() -> None:
    base, (other,) = inputs(gaussian, 5_000, 1, torch.bfloat16)
    steps = Steps(2)
    a, b, t = steps.load(0), steps.load(1), steps.number(0)
    with steps.exact():
        steps.store(a + t * (b - a))
    steps.store(a + t * (b - a))
    exact, rounded = torch.empty_like(base), torch.empty_like(base)
    steps.run([base, other], [0.3], out=[exact, rounded])
    assert_same(exact, (base.float() + 0.3 * (other.float() - base.float())).bfloat16())
    assert_same(rounded, base + 0.3 * (other - base))
    assert not torch.equal(exact, rounded)


def test_sums_that_are_exact() -> None:
    _, experts = inputs(grid, 100_003, 2, torch.float32)
    steps = Steps(2)
    a, b = steps.load(0), steps.load(1)
    steps.sum(a), steps.dot(a, b), steps.sum(a > b)
    expected = [experts[0].double().sum(), (experts[0].double() * experts[1]).sum(), (experts[0] > experts[1]).sum()]
    assert steps.run(experts).tolist() == [[x.item() for x in expected]]


@pytest.mark.parametrize("axis", AXES)
def test_dots_are_those_of_gram(axis: str) -> None:
    _, experts = inputs(gaussian, (5_000, 70), 2, torch.float32)
    steps = Steps(2)
    a, b = steps.load(0), steps.load(1)
    steps.dot(a, a), steps.dot(a, b), steps.dot(b, b)
    products = torch.ops.surgery_kernels.gram([], experts, 2, axis=axis)
    assert_same(
        steps.run(experts, axis=axis), torch.stack([products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]], 1)
    )


def test_limits_are_kept_in_flat_order() -> None:
    x = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, math.nan]])
    steps = Steps(1)
    steps.store(steps.load(0).within(0))
    kept = torch.empty_like(x)
    for cut, expected in ((0, [1, 0, 0, 0, 0, 0]), (2, [1, 1, 0, 0, 0, 0]), (4, [1, 1, 1, 1, 0, 0])):
        steps.run([x], [1.0, cut], out=[kept])
        assert kept.flatten().tolist() == expected
    steps.run([x], torch.tensor([[1.0, 2], [-1.0, 0]]), axis="row", out=[kept])
    assert kept.tolist() == [[1, 1, 0], [1, 1, 0]]
    steps.run([x], torch.tensor([[1.0, 4], [0.5, 0], [1.0, 2]]), axis="column", out=[kept])
    assert kept.tolist() == [[1, 1, 0], [1, 0, 0]]


def shared_and_bits(num_tasks: int) -> Steps:
    """Packed bits between outputs like the inputs, and sums."""
    steps = Steps(num_tasks)
    loaded = [steps.load(i) for i in range(num_tasks)]
    total = sum(loaded, 0.0)
    steps.store_bits(total > 0.0)
    steps.store(total)
    for x in loaded:
        steps.store_bits(x)
    steps.sum(total)
    return steps


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_bits(dtype: torch.dtype) -> None:
    steps = shared_and_bits(3)
    tensors = [x for shape in [*SHAPES, (33_000,)] for x in inputs_of(shape, 3, dtype)]
    for wide in (False, True):
        compare(tensors, 3, steps.program, steps.table([]), wide=wide)
    a, b, c = tensors[-3:]
    packed = torch.empty(4, 33_000 // 8, dtype=torch.uint8)
    steps.run([a, b, c], out=[packed[0], torch.empty_like(a), *packed[1:]])
    assert torch.equal(unpack(packed, a.shape)[1:], torch.stack([a, b, c]) != 0)


@pytest.mark.any_isa
def test_refused_bits() -> None:
    steps = shared_and_bits(1)
    x = torch.zeros(4, 3)
    bits = [torch.zeros(2, dtype=torch.uint8) for _ in range(2)]
    for message, out, axis in (
        ("out[0] must be uint8 of shape (2,), got torch.float32 (4, 3)", [x, torch.zeros_like(x), bits[1]], "tensor"),
        ("out[2] must be uint8 of shape (2,), got torch.uint8 (1,)", [bits[0], x, bits[1][:1]], "tensor"),
        ("axis must be 'tensor' for a program with bits, got 'row'", [bits[0], x, bits[1]], "row"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            steps.run([torch.ones_like(x)], axis=axis, out=out)
    program, numbers = steps.program, steps.table([])
    for message, out, axis in (
        ("out must be contiguous uint8 [2] on the CPU for bits, got another tensor", [x, x.clone(), bits[1]], "tensor"),
        ("axis must be 'tensor' for a program with bits, got 'row'", [bits[0], x, bits[1]], "row"),
        ("out must be apart from every other out, got memory that overlaps one", [bits[0], x, bits[0]], "tensor"),
    ):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            steps_out([torch.ones_like(x)], 1, program, numbers, axis=axis, out=out)
    only_bits = Steps(1)
    only_bits.store_bits(only_bits.load(0))
    message = "the program must store its keys and nothing else, got 1 outputs and 0 sums"
    with pytest.raises(ValueError, match=f"^{message}$"):
        only_bits.limits([x], [1])


def test_exponentials_and_logarithms_are_good() -> None:
    x = torch.cat([torch.linspace(-745, 709.7, 100_001, dtype=torch.float64), torch.linspace(-1, 1, 10_001).double()])
    assert_close_in_ulp(apply(Code.EXP, x), x.exp(), 2)
    positive = torch.cat([torch.logspace(-323, 308, 100_001, dtype=torch.float64), 1 + x[-10_001:] / 1_000])
    assert_close_in_ulp(apply(Code.LOG, positive), positive.log(), 2)
    edges = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 710.0, -746.0, -1.0, 5e-324])
    for dtype in (torch.float64, torch.float32):
        assert_same(apply(Code.EXP, edges.to(dtype)), edges.to(dtype).exp())
        assert_same(apply(Code.LOG, edges.to(dtype)), edges.to(dtype).double().log().to(dtype))


def apply(code: Code, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    words = [Code.LOAD, 0, 0, 0, 0, code, 0, 0, 0, 0, Code.STORE, 0, 0, 0, 0]
    steps_out([x], 1, words, torch.zeros(1, 0, dtype=torch.float64), out=[out])
    return out


def assert_close_in_ulp(x: Tensor, expected: Tensor, most: int) -> None:
    assert (bits(x) - bits(expected)).abs().max() <= most


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_layouts(dtype: torch.dtype) -> None:
    base, (other,) = inputs(gaussian, (301, 333), 1, dtype)
    steps, expected = nearswap(), eager_nearswap(base, other, 0.07)
    moved = [x.t().contiguous().t() for x in (base, other)]
    out = torch.empty(333, 602, dtype=dtype)[:, ::2].t()
    steps.run(moved, [0.07], out=[out])
    assert_same(out, expected)
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (base, other, base)]
    steps.run(shifted[:2], [0.07], out=shifted[2:])
    assert_same(shifted[2], expected)


def test_large_outputs_are_written_past_the_caches() -> None:
    base, (other,) = inputs(gaussian, 2_100_003, 1, torch.float32)
    for begin in (0, 1):
        out = torch.full((2_100_003 + 1,), 7.0)[begin:][:2_100_003]
        nearswap().run([base, other], [0.07], out=[out])
        assert_same(out, eager_nearswap(base, other, 0.07))


def test_in_place() -> None:
    for shape in ((70_001,), (40, 50)):
        base, (other,) = inputs(gaussian, shape, 1, torch.bfloat16)
        expected = eager_nearswap(base, other, 0.07)
        for i in (0, 1):
            given = [base.clone(), other.clone()]
            nearswap().run(given, [0.07], out=[given[i]])
            assert_same(given[i], expected)
        turned = base.t().contiguous().t() if base.dim() > 1 else base
        nearswap().run([turned, other], [0.07], out=[turned])
        assert_same(turned, expected)


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
def test_determinism() -> None:
    for dtype in DTYPES:
        tensors = inputs_of((70, 1_501), 2, dtype)
        for axis in AXES:
            numbers = numbers_of(num_blocks((70, 1_501), axis), 70 * 1_501)
            results = []
            for isa in _C.isas():
                for threads in (1, 2, 3, 7):
                    _C.set_isa(isa)
                    torch.set_num_threads(threads)
                    out = [torch.empty_like(x) for x in tensors]
                    results.append([steps_out(tensors, 2, random_program(146, 2), numbers, axis=axis, out=out), *out])
            for result in results[1:]:
                for x, first in zip(result, results[0], strict=True):
                    assert_same(x, first)
                    assert torch.equal(bits(x.nan_to_num()), bits(first.nan_to_num()))  # tells -0 from 0


def test_programs_share_what_is_the_same_and_drop_what_nobody_needs() -> None:
    steps = Steps(2)
    a, b = steps.load(0), steps.load(1)
    (a * 2.0).exp()
    steps.store((a + b) * (a + b) * 0.5)
    assert steps.program[::5] == [Code.LOAD, Code.LOAD, Code.ADD, Code.MUL, Code.NUMBER, Code.MUL, Code.STORE]


def test_values_that_the_dtype_holds_are_not_rounded_again() -> None:
    steps = Steps(2)
    a, b = steps.load(0), steps.load(1)
    steps.store((a > b).where(abs(-a).minimum(b), a.maximum(b)))
    steps.store(a.minimum(0.3))
    rounded = {Code(code) for code, rounds in zip(steps.program[::5], steps.program[4::5], strict=True) if rounds}
    assert rounded == {Code.MIN}


def test_registers_are_used_again() -> None:
    steps = Steps(64)
    total = steps.load(0)
    for i in range(1, 64):
        total = total + steps.load(i) * 0.5
    steps.store(total)
    assert max(steps.program[1::5]) == 2  # the total, an input, the number, their product


def test_values_that_are_read_again_survive_steps_in_place() -> None:
    steps = Steps(3)
    a, b, c = (steps.load(i) for i in range(3))
    mask = a > b
    with steps.exact():
        steps.store(a.times_plus(b, c) + c)
        steps.store(mask.where(b, c) + mask)
        steps.store(a.times_plus(a, a))
    tensors = [torch.randn(500) for _ in range(3)]
    out = [torch.empty(500) for _ in range(3)]
    steps.run(tensors, out=out)
    x, y, z = tensors
    assert_same(out[0], (x.double() * y + z).float() + z)
    assert_same(out[1], torch.where(x > y, y, z) + (x > y).float())
    assert_same(out[2], (x.double() * x + x).float())


def test_programs_grow_after_a_run() -> None:
    steps = Steps(1)
    x = steps.load(0)
    steps.sum(x * 2.0)
    assert steps.run([torch.ones(3)]).tolist() == [[6.0]]
    steps.sum(x * steps.number(1) + 1.0)
    assert steps.run([torch.ones(3)], [0.0, 4.0]).tolist() == [[6.0, 15.0]]


REFUSED_PROGRAMS: list[tuple[str, list[int]]] = [
    ("program must be five integers for every step, got 0", []),
    ("program must be five integers for every step, got 6", [0, 0, 0, 0, 0, 21]),
    ("program must have codes in [0, 23), got 23", [23, 0, 0, 0, 0]),
    ("program must have inputs in [0, 2), got 2", [0, 0, 2, 0, 0]),
    ("program must have numbers in [0, 1), got 1", [1, 0, 1, 0, 0]),
    ("program must have numbers in [0, 1), got 1", [0, 0, 0, 0, 0, 18, 1, 0, 0, 0]),
    ("program must have registers in [0, 1024), got 1024", [0, 1024, 0, 0, 0]),
    ("program must have registers in [0, 1024), got -1", [0, -1, 0, 0, 0]),
    ("program must have sums in [0, 1024), got -1", [0, 0, 0, 0, 0, 19, -1, 0, 0, 0]),
    ("program must fill a register before it is read, got 1 in step 1", [0, 0, 0, 0, 0, 2, 1, 0, 1, 0]),
    ("program must fill a register before it is read, got 1 in step 1", [0, 0, 0, 0, 0, 6, 1, 0, 0, 0]),
    ("program must fill a register before it is read, got -1 in step 0", [21, 0, -1, 0, 0]),
    ("program must use every one of its outputs, got none for 0", [0, 0, 0, 0, 0, 21, 1, 0, 0, 0]),
]


@pytest.mark.any_isa
@pytest.mark.parametrize(("message", "program"), REFUSED_PROGRAMS, ids=str)
def test_refused_programs(message: str, program: list[int]) -> None:
    numbers = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        steps_out([torch.zeros(3), torch.zeros(3)], 2, program, numbers, out=[torch.zeros(3)])


A, B = torch.zeros(4, 3), torch.ones(4, 3)

# argument, requirement, value, and what differs from a good run
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("inputs must be 2 tensors for each that is computed, got 3", {"inputs": [A, B, A]}),
    ("inputs must be 2 tensors for each that is computed, got 0", {"inputs": []}),
    ("inputs[0] must be a tensor, got float", {"inputs": [1.0, B]}),
    ("inputs[1] must be a tensor, got float", {"inputs": [A, 1.0]}),
    ("inputs[1] must have the shape of inputs[0], (4, 3), got (3,)", {"inputs": [A, B[0]]}),
    ("inputs[3] must have the dtype of inputs[2], torch.float32, got torch.float16", {"inputs": [A, B, A, B.half()]}),
    ("inputs[0] must be float64, float32, float16 or bfloat16, got torch.int64", {"inputs": [A.long(), B]}),
    ("axis must be one of 'tensor', 'row', 'column', got 'model'", {"axis": "model"}),
    ("out must be 1 tensors, 1 for each computed, got 0", {"out": []}),
    ("out[0] must have the shape of its inputs, (4, 3), got (3,)", {"out": [torch.zeros(3)]}),
    ("numbers must be [1] or [num_blocks, 1], got (1, 0)", {"numbers": []}),
    ("numbers must be [1] or [num_blocks, 1], got (1, 1, 1)", {"numbers": torch.zeros(1, 1, 1)}),
]

REFUSED_BY_THE_OP: list[tuple[str, dict[str, Any]]] = [
    ("numbers must be of 1 block or of 4, got 3", {"numbers": torch.zeros(3, 1), "axis": "row"}),
    ("numbers must be of 1 block or of 3, got 4", {"numbers": torch.zeros(4, 1), "axis": "column"}),
    ("out must be apart from every input, got memory that overlaps one", {"out": [A.view(-1).view(3, 4).t()]}),
]


@pytest.mark.any_isa
@pytest.mark.parametrize(("message", "change"), [*REFUSED, *REFUSED_BY_THE_OP], ids=str)
def test_refused(message: str, change: dict[str, Any]) -> None:
    call: dict[str, Any] = {"inputs": [A, B], "numbers": [0.1], "out": [torch.full((4, 3), 7.0)], **change}
    error = RuntimeError if (message, change) in REFUSED_BY_THE_OP else (ValueError, TypeError)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        nearswap().run(call.pop("inputs"), call.pop("numbers"), **call)
    assert all((x == 7).all() for x in call["out"] if x.shape == (4, 3) and x.data_ptr() != A.data_ptr())


@pytest.mark.any_isa
def test_refused_by_the_op_alone() -> None:
    numbers, out = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(4, 3)
    program = [Code.LOAD, 0, 0, 0, 0, Code.STORE, 0, 0, 0, 0]
    late = [*program, Code.LOAD, 1, 1, 0, 0]
    for message, call in {
        "inputs must be num_inputs tensors for every tensor that is computed, got 1 for 2": ([A], 2, program, numbers),
        "inputs must be num_inputs tensors for every tensor that is computed, got 1 for 0": ([A], 0, program, numbers),
        "inputs[1] must have the dtype of inputs[0], got another": ([A, B.double()], 2, program, numbers),
        "inputs must be all float64 or none, got both": ([A, A.double()], 1, program, numbers),
        "inputs must be float64, float32, float16 or bfloat16, got another dtype": ([A.int()], 1, program, numbers),
        "numbers must be float64 [num_blocks, num_numbers] on the CPU, got another dtype, shape or device": (
            [A], 1, program, numbers.float(),
        ),
        "axis must be one of 'tensor', 'row', 'column', got 'rows'": ([A], 1, program, numbers, "rows"),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            steps_out(*call, out=[out])
    message = "program must load before it stores where out is an input, got a load after a store"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        steps_out([A, out], 2, late, numbers, out=[out])
    message = "out must be 1 for every tensor that is computed, got 2 for 1"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        steps_out([A], 1, program, numbers, out=[out, out.clone()])


def add_foreign(steps: Steps) -> object:
    return steps.load(0) + Steps(1).load(0)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("num_inputs must be 1 or more, got 0", lambda steps: Steps(0)),
        ("i must be in [0, 1), got 1", lambda steps: steps.load(1)),
        ("k must be 0 or greater, got -1", lambda steps: steps.number(-1)),
        ("an operand must be a value of this program or a number, got 'x'", lambda steps: steps.load(0) + "x"),
        ("an operand must be a value of this program or a number, got one of another program", add_foreign),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_steps(message: str, build: Callable[[Steps], object]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        build(Steps(1))


@pytest.mark.any_isa
@pytest.mark.parametrize("axis", AXES)
def test_opcheck(axis: str) -> None:
    tensors = [x for shape in ((10, 7), (33,)) for x in inputs(gaussian, shape, 2, torch.float32)[1]]
    steps = nearswap()
    steps.dot(steps.load(0), steps.load(1))
    numbers = torch.tensor([[0.07, 1e-6, 1.0, 0.0]]).double().expand(num_blocks((10, 7), axis) + 1, -1)
    options = {"axis": axis, "out": [torch.zeros_like(x) for x in tensors[::2]]}
    torch.library.opcheck(steps_out, (tensors, 2, steps.program, numbers), options)


@pytest.mark.any_isa
def test_compiled() -> None:
    program = nearswap().program

    def merge(base: Tensor, other: Tensor, numbers: Tensor) -> Tensor:
        out = torch.empty_like(base)
        sums = steps_out([base, other], 2, program, numbers, out=[out])
        return out * 2 + sums.numel()

    torch.compiler.reset()
    base, (other,) = inputs(gaussian, (7, 30), 1, torch.float32)
    numbers = torch.tensor([[0.07, 1e-6, 1.0, 0.0]], dtype=torch.float64)
    doubled = torch.compile(merge, fullgraph=True, backend="aot_eager")(base, other, numbers)
    assert_same(doubled, 2 * eager_nearswap(base, other, 0.07))
