"""mix and mix_out, what averaging, task arithmetic and WiSE-FT are made of, against the oracle."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, mix, reference
from surgery_kernels.ops.mix import num_blocks_of
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SHAPES,
    assert_same,
    bits,
    gaussian,
    generator,
    grid,
    inputs,
    option_id,
    weights_of,
)

mix_out = torch.ops.surgery_kernels.mix_out

AXES = ["tensor", "row", "column"]
ONE_EACH = torch.ones(1, 2, 1, dtype=torch.float64)


def check(base: Tensor | None, experts: list[Tensor], coefficients: object, **options: Any) -> None:
    merged = mix(base, experts, coefficients, **options)
    expected = reference.mix(base, experts, coefficients, **options)
    assert isinstance(merged, list) == isinstance(expected, list)
    for actual, wanted in zip(listed(merged), listed(expected), strict=True):
        assert_same(actual, wanted, str(options))


def listed(tensors: Tensor | list[Tensor]) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


def table(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, 257, 4, dtype)
    for fused, divisor in itertools.product((False, True), (1.0, -3.0)):
        options = {"fused": fused, "divisor": divisor}
        check(None, experts, weights_of(4), **options)
        check(base, experts, weights_of(4), **options)
        check(base, experts, weights_of(4), base_coefficients=0.3, task_vectors=False, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [*SHAPES, (20, 33), (5, 2, 65), (3, 1)], ids=str)
def test_every_shape_and_axis(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    check(base, experts, [0.3, 1.0, -2.0])
    for axis in ("row", "column"):
        blocks = num_blocks_of(shape, axis)
        check(base, experts, table(3, blocks), axis=axis)
        check(base, experts, table(2, 3, blocks), base_coefficients=table(2, blocks), axis=axis)
        check(None, experts, table(2, 3, 1), axis=axis, divisor=3.0)
        check(base, experts, table(3, blocks), base_coefficients=[0.5], axis=axis)
        if math.prod(shape) < 1000:
            check(base, experts, table(3, 1), base_coefficients=table(blocks), axis=axis, fused=True)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    for dtype, fused in itertools.product(DTYPES, (False, True)):
        base, experts = inputs(gaussian, 300, num_tasks, dtype)
        check(base, torch.stack(experts), weights_of(num_tasks), fused=fused)


@pytest.mark.parametrize("num_outputs", [1, 2, 3, 4, 5, 7, 8, 9, 16, 23])
def test_every_number_of_outputs(num_outputs: int) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 101, 3, dtype)
        check(base, experts, table(num_outputs, 3).tolist(), base_coefficients=table(num_outputs))
        base, experts = inputs(gaussian, (3, 34), 3, dtype)
        check(base, experts, table(num_outputs, 3, 34), axis="column", fused=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("axis", AXES)
def test_layouts_and_large_tensors(axis: str, dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, (301, 333), 3, dtype)
    coefficients = table(2, 3, num_blocks_of(base.shape, axis))
    coefficients = coefficients[..., 0] if axis == "tensor" else coefficients
    expected = reference.mix(base, experts, coefficients, axis=axis)

    def same(base: Tensor, *experts: Tensor, out: list[Tensor] | None = None) -> None:
        for merged, wanted in zip(mix(base, experts, coefficients, axis=axis, out=out), expected, strict=True):
            assert_same(merged, wanted)

    same(base, *experts)
    same(*(x.t().contiguous().t() for x in (base, *experts)))
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (base, *experts)]
    same(*shifted)
    out = [torch.full((333, 602), 7.0, dtype=dtype)[:, ::2].t() for _ in range(2)]
    same(base, *experts, out=out)
    assert all((x.t().as_strided((333, 301), (602, 2), 1) == 7).all() for x in out)
    coefficients = coefficients.transpose(0, 1).contiguous().transpose(0, 1)
    same(base, *experts)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_outputs_past_the_caches(shift: int) -> None:
    """Lines that outputs share with what is beside them, and outputs that do not begin their lines together."""
    size = (8 << 20) // 4 + 77
    base, experts = inputs(grid, size, 2, torch.float32)
    expected = reference.mix(base, experts, [[0.5, 0.25], [1.0, -1.0]])
    buffers = [torch.full((size + 64,), 7.0) for _ in range(2)]
    out = [buffer[place : place + size] for buffer, place in zip(buffers, (3, 3 + shift), strict=True)]
    mix(base, experts, [[0.5, 0.25], [1.0, -1.0]], out=out)
    for buffer, place, wanted in zip(buffers, (3, 3 + shift), expected, strict=True):
        assert_same(buffer[place : place + size], wanted)
        assert (buffer[:place] == 7).all() and (buffer[place + size :] == 7).all()


@pytest.mark.parametrize("axis", AXES)
def test_several_tensors_of_several_dtypes(axis: str) -> None:
    shapes = [(7, 5), (), (0,), (33,), (2, 3, 4), (3, 0, 2), (64, 2)]
    problems = [inputs(gaussian, shape, 2, DTYPES[1 + i % 3]) for i, shape in enumerate(shapes)]
    bases, experts = [base for base, _ in problems], [expert for _, of_tensor in problems for expert in of_tensor]
    counts = [num_blocks_of(shape, axis) for shape in shapes]
    coefficients, of_base = table(2, 2, sum(counts)), table(2, sum(counts))
    out = [torch.full_like(base, math.nan) for base in bases for _ in range(2)]
    mix_out(bases, experts, coefficients, of_base, axis=axis, out=out)
    for i, ((base, of_tensor), its, its_base) in enumerate(
        zip(problems, coefficients.split(counts, dim=-1), of_base.split(counts, dim=-1), strict=True)
    ):
        own = (its[..., 0], its_base[..., 0]) if axis == "tensor" else (its, its_base)
        expected = reference.mix(base, of_tensor, own[0], base_coefficients=own[1], axis=axis)
        for merged, wanted in zip(out[2 * i : 2 * i + 2], expected, strict=True):
            assert_same(merged, wanted, f"{axis} of {tuple(base.shape)}")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("num_tasks", [2, 5, 11])
def test_in_place(num_tasks: int, axis: str) -> None:
    """As many outputs as experts, each in the place of one: every expert is read before any of them is written."""
    for dtype in DTYPES:
        base, experts = inputs(gaussian, (130, 257), num_tasks, dtype)
        coefficients = table(num_tasks, num_tasks, num_blocks_of(base.shape, axis))
        coefficients = coefficients[..., 0] if axis == "tensor" else coefficients
        expected = reference.mix(base, experts, coefficients, axis=axis)
        places = experts[1:] + experts[:1]
        merged = mix(base, experts, coefficients, axis=axis, out=places)
        assert all(actual is place for actual, place in zip(merged, places, strict=True))
        for actual, wanted in zip(merged, expected, strict=True):
            assert_same(actual, wanted)


def test_in_the_place_of_the_base_and_of_what_is_not_contiguous() -> None:
    base, experts = inputs(gaussian, (31, 33), 3, torch.float32)
    expected = reference.mix(base, experts, [0.3] * 3)
    moved = [x.t().contiguous().t() for x in (base, *experts)]
    version = moved[0]._version
    assert mix(moved[0], moved[1:], [0.3] * 3, out=moved[0]) is moved[0]
    assert_same(moved[0], expected)
    assert moved[0]._version > version
    experts[1].requires_grad_()
    with torch.no_grad():
        assert mix(base, experts, [0.3] * 3, out=experts[1]) is experts[1]
    assert_same(experts[1].detach(), expected)


def test_fused_is_another_rounding() -> None:
    _, experts = inputs(gaussian, 1_000, 5, torch.float32)
    fused, apart = (mix(None, experts, [0.3] * 5, fused=fused) for fused in (True, False))
    assert 0.05 < (fused != apart).float().mean() < 0.9
    torch.testing.assert_close(fused, apart, rtol=1e-5, atol=1e-6)
    exact = 1 + 2**-12  # its square is half-way between two float32 but for its last bit
    pair = [torch.tensor([-exact * (1 + 2**-11)]), torch.tensor([exact])]
    assert mix(None, pair, [1.0, exact], fused=True).item() == exact**2 - exact * (1 + 2**-11)


def test_wise_ft_is_one_read_of_what_task_arithmetic_computes() -> None:
    base, experts = inputs(gaussian, (33, 65), 1, torch.bfloat16)
    curve = mix(base, experts, [[a / 4] for a in range(5)])
    for a, merged in enumerate(curve):
        assert_same(merged, mix(base, experts, [a / 4]))
    assert_same(curve[0], base)


@pytest.mark.parametrize("task_vectors", [True, False])
def test_nonfinite_values(task_vectors: bool) -> None:
    base, experts = inputs(grid, 100, 2, torch.float32)
    experts[1][[3, 5]] = torch.tensor([math.nan, math.inf])
    for nonfinite in ("drop", "propagate"):
        check(base, experts, [1.0, 0.5], nonfinite=nonfinite, task_vectors=task_vectors)
        check(None, experts, [1.0, 0.5], nonfinite=nonfinite, task_vectors=task_vectors, fused=True)
    message = "experts[1] must be finite, got 2 NaN or infinite values"
    out = torch.full((100,), 7.0)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        mix(base, experts, [1.0, 0.5], out=out, task_vectors=task_vectors)
    experts[1][[3, 5]] = 0
    base[7] = -math.inf
    message = "base must be finite, got 1 NaN or infinite values in tensor 'b'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        mix_out([base], experts, ONE_EACH, task_vectors=task_vectors, names=["b"], out=[out])
    assert (out == 7).all()


def test_task_vectors_that_overflow() -> None:
    base, expert = torch.tensor([-60_000.0]).half(), torch.tensor([60_000.0]).half()
    message = "experts[0] - base must be finite, got 1 overflows"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        mix(base, [expert], [0.5])
    assert mix(base, [expert], [0.5], task_vectors=False).item() == -30_000
    assert mix(base, [expert], [0.5], nonfinite="drop").item() == 0  # float32 holds the difference


NOT_FINITE = [
    (lambda base, experts: experts[1].fill_(math.nan), "experts[1] must be finite, got 40 NaN or infinite values"),
    (lambda base, experts: experts[0][39:].fill_(-math.inf), "experts[0] must be finite, got 1 NaN or infinite values"),
    (lambda base, experts: base[20:22].fill_(math.inf), "base must be finite, got 2 NaN or infinite values"),
    (lambda base, experts: base.fill_(math.nan), "base must be finite, got 40 NaN or infinite values"),
]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_what_is_not_finite_is_noticed_by_the_one_read(dtype: torch.dtype, axis: str) -> None:
    """Where an output is fresh; else before it is written, which takes a second one."""
    for spoil, message in NOT_FINITE:
        for task_vectors in (True, False):
            base, experts = inputs(grid, 40, 2, dtype)
            spoil(base, experts)
            for fresh in (True, False):
                out = torch.full_like(base, 7)
                with pytest.raises(RuntimeError, match=f"^{re.escape(message)} in tensor 'w'$"):
                    mix_out([base], experts, ONE_EACH, task_vectors=task_vectors, axis=axis, names=["w"], fresh=fresh,
                            out=[out])  # fmt: skip
                assert fresh or (out == 7).all()
    base, experts = inputs(grid, 40, 2, dtype)
    for fresh in (True, False):
        before, out = _C.bytes_read(), torch.empty_like(base)
        mix_out([base], experts, ONE_EACH, axis=axis, fresh=fresh, out=[out])
        assert _C.bytes_read() - before == (1 if fresh else 2) * 3 * base.nbytes


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65_504.0), (torch.bfloat16, 2.0**128 - 2.0**120), (torch.float32, 3.4e38)]
)
def test_the_smallest_difference_that_overflows_is_noticed(dtype: torch.dtype, largest: float) -> None:
    """Half a step beyond the largest number that is stored, in any lane of a vector."""
    largest = torch.tensor(largest, dtype=dtype).item()
    half_a_step = {torch.float16: 16.0, torch.bfloat16: 2.0**119}.get(dtype, largest)
    for place in range(0, 70, 3):
        base, expert = torch.zeros(70, dtype=dtype), torch.zeros(70, dtype=dtype)
        expert[place], base[place] = largest, -half_a_step
        with pytest.raises(RuntimeError, match=r"^experts\[0\] - base must be finite, got 1 overflows$"):
            mix(base, [expert], [1.0])
        base[place] = -half_a_step / 2
        if dtype != torch.float32:
            mix(base, [expert], [0.5])


def test_an_input_that_is_filled_is_not_fresh() -> None:
    base, experts = inputs(grid, 40, 2, torch.float32)
    experts[0][3] = math.nan
    kept = base.clone()
    with pytest.raises(RuntimeError, match=r"^experts\[0\] must be finite, got 1 NaN or infinite values$"):
        mix_out([base], experts, ONE_EACH, fresh=True, out=[base])
    assert_same(base, kept)


def test_coefficients_that_are_not_finite() -> None:
    payload = torch.tensor([-1], dtype=torch.int64).view(torch.float64)
    for dtype in DTYPES:
        base, experts = inputs(gaussian, (3, 40), 1, dtype)
        for axis in ("row", "column"):
            coefficients = payload.expand(1, num_blocks_of((3, 40), axis))
            assert mix(base, experts, coefficients, axis=axis).isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"axis": "rows"}, ValueError, "axis must be one of 'tensor', 'row', 'column', got 'rows'"),
        ({"nonfinite": "x"}, ValueError, "nonfinite must be one of 'error', 'propagate', 'drop', got 'x'"),
        ({"divisor": 0}, ValueError, "divisor must be finite and not 0, got 0.0"),
        ({"divisor": math.inf}, ValueError, "divisor must be finite and not 0, got inf"),
        ({"divisor": "1"}, TypeError, "divisor must be a number, got '1'"),
        ({"coefficients": [1.0]}, ValueError, "coefficients must have shape (2,), got (1,)"),
        ({"coefficients": [[1.0] * 3] * 4}, ValueError, "coefficients must have shape (4, 2), got (4, 3)"),
        ({"coefficients": 0.3}, ValueError, "coefficients must have shape (2,), got ()"),
        ({"coefficients": [math.nan, 1]}, ValueError, "coefficients must be finite, got nan"),
        ({"coefficients": ["a", 1]}, TypeError, "coefficients must be numbers in lists, got 'a'"),
        ({"coefficients": torch.ones(0, 2)}, ValueError, "coefficients must be of at least one output, got none"),
        ({"coefficients": torch.ones(2, device="meta")}, ValueError,
         "coefficients must be on the CPU or on the device of experts[0], got meta"),
        ({"coefficients": [[1.0], [1.0, 2.0]]}, ValueError,
         "coefficients must be numbers in lists of one length, got [[1.0], [1.0, 2.0]]"),
        ({"coefficients": [[1.0] * 5] * 2, "axis": "row"}, ValueError,
         "coefficients must have shape (2, 4), got (2, 5)"),
        ({"base_coefficients": [1.0, 2.0]}, ValueError, "base_coefficients must have shape (), got (2,)"),
        ({"base_coefficients": 1.0, "base": None}, ValueError, "base_coefficients must be None without base, got some"),
        ({"out": [torch.zeros(4, 5)]}, TypeError, "out must be a tensor, got list"),
        ({"coefficients": [[1.0] * 2] * 3, "out": [torch.zeros(4, 5)]}, ValueError,
         "out must be one tensor for each of 3 outputs, got 1"),
        ({"coefficients": [[1.0] * 2], "out": [torch.zeros(4)]}, ValueError,
         "out[0] must have the shape of experts[0], (4, 5), got (4,)"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_mix(change: dict[str, Any], error: type[Exception], message: str) -> None:
    base, experts = inputs(grid, (4, 5), 2, torch.float32)
    arguments = {"base": base, "experts": experts, "coefficients": [1.0, 0.5], **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        mix(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divisor": 0.0}, "divisor must not be 0, got 0"),
        ({"axis": "rows"}, "axis must be one of 'tensor', 'row', 'column', got 'rows'"),
        ({"coefficients": ONE_EACH.float()}, "coefficients must be float64 [num_outputs, num_tasks, num_blocks] "
         "on the CPU, got another dtype, shape or device"),
        ({"coefficients": ONE_EACH[0]}, "coefficients must be float64 [num_outputs, num_tasks, num_blocks] "
         "on the CPU, got another dtype, shape or device"),
        ({"coefficients": ONE_EACH[:0]}, "coefficients must be of at least one output, got none"),
        ({"coefficients": ONE_EACH.expand(1, 2, 3)}, "coefficients must be of 1 block or of 2, got 3"),
        ({"coefficients": ONE_EACH.expand(1, 2, 3), "axis": "row"}, "coefficients must be of 1 block or of 8, got 3"),
        ({"coefficients": torch.ones(1, 3, 1, dtype=torch.float64)},
         "experts must be one tensor for every expert and merged tensor, got 4 for 3 experts"),
        ({"base_coefficients": ONE_EACH[0]},
         "base_coefficients must be float64 [1, 1] on the CPU, got another dtype, shape or device"),
        ({"base_coefficients": ONE_EACH[:, 0], "base": []},
         "base_coefficients must be None without base, got a tensor"),
        ({"out": 1}, "out must be one tensor for every merged tensor, got 1"),
        ({"coefficients": ONE_EACH.expand(3, 2, 1)}, "out must be 3 tensors for every merged tensor, got 2 for 2"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_the_op(change: dict[str, Any], message: str) -> None:
    bases, experts = [torch.zeros(4, 5)] * 2, [torch.zeros(4, 5)] * 4
    given = {"base": bases, "experts": experts, "coefficients": ONE_EACH, **change}
    given["out"] = [torch.zeros(4, 5) for _ in range(given.get("out", 2))]
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        mix_out(**given)


def test_memory_that_overlaps() -> None:
    base, first, second = (torch.zeros(4, 4) for _ in range(3))
    wide = torch.zeros(5, 4)
    apart = r"^out must be apart from every input, got memory that overlaps one$"
    for expert, out in ((first, first.t()), (wide[1:], wide[:4]), (wide[:4], wide[1:])):
        with pytest.raises(RuntimeError, match=apart):
            mix(base, [expert, second], [0.5, 0.5], out=out)
    for experts in ([first, second, first, second], [second, second, second, first]):  # read after it is written
        with pytest.raises(RuntimeError, match=apart):
            mix_out([base, base], experts, ONE_EACH, out=[first, torch.zeros(4, 4)])
    with pytest.raises(RuntimeError, match=r"^out must be apart from every other out, got memory that overlaps one$"):
        mix(base, [first, second], [[0.5, 0.5]] * 2, out=[first, first])


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
@pytest.mark.parametrize("fused", [True, False])
def test_determinism(fused: bool) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, (50, 1_001), 5, dtype)
        for axis in AXES:
            coefficients = table(3, 5, num_blocks_of(base.shape, axis))
            coefficients = coefficients[..., 0] if axis == "tensor" else coefficients
            results = []
            for isa in _C.isas():
                for threads in (1, 2, 3, 7):
                    _C.set_isa(isa)
                    torch.set_num_threads(threads)
                    merged = mix(base, experts, coefficients, axis=axis, fused=fused, divisor=3.0)
                    results.append(torch.stack([bits(x) for x in merged]))
            assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.any_isa
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
def test_opcheck(with_base: bool) -> None:
    bases, experts = [], []
    for count in (100, 33):
        base, of_tensor = inputs(gaussian, count, 2, torch.float32)
        bases.append(base)
        experts += of_tensor
    out = [torch.zeros_like(base) for base in bases]
    options = {"names": ["a", "b"], "out": out}
    torch.library.opcheck(mix_out, (bases if with_base else [], experts, ONE_EACH), options)
    out = [torch.zeros_like(base) for base in bases for _ in range(2)]
    options = {"base_coefficients": table(2, 2) if with_base else None, "axis": "row", "fused": True, "out": out}
    torch.library.opcheck(mix_out, (bases if with_base else [], experts, table(2, 2, 2)), options)


@pytest.mark.any_isa
def test_compiled() -> None:
    def merge(base: Tensor, experts: list[Tensor], rows: Tensor, out: Tensor) -> list[Tensor]:
        curve = mix(base, experts, [[0.0, 0.25], [0.5, 0.5]], divisor=2.0)
        return [*curve, mix(base, experts, rows, axis="row", fused=True, out=out) * 2]

    torch.compiler.reset()
    base, experts = inputs(gaussian, (33, 5), 2, torch.bfloat16)
    arguments = (base, experts, table(2, 33), torch.empty_like(base))
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")(*arguments)
    for actual, expected in zip(compiled, merge(*arguments), strict=True):
        assert_same(actual, expected)


@pytest.mark.any_isa
def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    with torch.device("meta"):
        base, stacked = torch.empty(7, 5, dtype=torch.bfloat16), torch.empty(4, 7, 5, dtype=torch.bfloat16)
        merged = [mix(base, stacked, [0.3] * 4), *mix(None, stacked, [[0.3] * 4] * 2)]
    for x in merged:
        assert (tuple(x.shape), x.dtype, x.device.type) == ((7, 5), torch.bfloat16, "meta")
