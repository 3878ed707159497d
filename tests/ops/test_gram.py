"""gram against the oracle, to the bit, and against X X^T."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import _C, gram, reference
from surgery_kernels.reference.sums import fold_halves
from tests.cases import (
    DTYPES,
    KINDS,
    NOT_FINITE,
    NUM_TASKS,
    SHAPES,
    assert_same,
    bits,
    gaussian,
    generator,
    grid,
    inputs,
    not_finite,
    option_id,
)
from tests.peak_memory import INPUT_BYTES

op = torch.ops.surgery_kernels.gram

AXES = ["tensor", "row", "column", "model"]


def check(base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    assert_same(gram(base, experts, **options), reference.gram(base, experts, **options), str(options))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, (9, 31), 4, dtype)
    for axis, rounded in itertools.product(AXES, (False, True)):
        check(base, experts, axis=axis, rounded=rounded)
        check(None, experts, axis=axis, rounded=rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (3, 0), (65, 33), (5, 4, 129)], ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    for axis in AXES:
        check(base, experts, axis=axis)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, (7, 43), num_tasks, dtype)
        for axis in AXES:
            check(base, experts, axis=axis)


@pytest.mark.parametrize("shape", [(5 * 32_768 + 77,), (2, 3 * 32_768 + 1), (5 * 4_096 + 3, 7), (4_096, 133)], ids=str)
def test_vectors_of_many_blocks(shape: tuple[int, ...]) -> None:
    base, experts = inputs(gaussian, shape, 2, torch.float32)
    for axis in AXES:
        check(base, experts, axis=axis)


def test_more_sums_than_wait_at_once() -> None:
    """64 experts have 21 MB of sums in the five runs of two strips of columns; two experts have few."""
    _, pair = inputs(gaussian, (4 * 4_096 + 1, 133), 2, torch.bfloat16)
    few = gram(None, pair, axis="column")
    assert_same(gram(None, pair * 32, axis="column"), few.repeat(1, 32, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("axis", AXES)
def test_layouts(axis: str, dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, (301, 133), 3, dtype)
    expected = reference.gram(base, experts, axis=axis)
    moved = [x.t().contiguous().t() for x in (base, *experts)]
    assert_same(gram(moved[0], moved[1:], axis=axis), expected)
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (base, *experts)]
    assert_same(gram(shifted[0], torch.stack(shifted[1:]), axis=axis), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_exact_sums_are_those_of_a_matrix_product(dtype: torch.dtype) -> None:
    base, experts = inputs(grid, (70, 1_031), 5, dtype)
    x = torch.stack(experts).double() - base.double()  # [num_tasks, rows, columns]
    assert_same(gram(base, experts), torch.einsum("irc,jrc->ij", x, x))
    assert_same(gram(base, experts, axis="row"), torch.einsum("irc,jrc->rij", x, x))
    assert_same(gram(base, experts, axis="column"), torch.einsum("irc,jrc->cij", x, x))
    raw = torch.stack(experts).double().flatten(1)
    assert_same(gram(None, experts), raw @ raw.T)


def test_rounded_to_the_stored_dtype() -> None:
    base, expert = torch.tensor([256.0]).bfloat16(), torch.tensor([1.0]).bfloat16()  # -255 has eight bits, 257 nine
    assert gram(-base, [expert]).item() == 257**2
    assert gram(-base, [expert], rounded=True).item() == 256**2
    assert gram(base, [expert], rounded=True).item() == 255**2


@pytest.mark.parametrize("axis", AXES)
def test_several_tensors_of_several_dtypes(axis: str) -> None:
    bases, experts = [], []
    for i, shape in enumerate([(40, 33), (0,), (5,), (), (3, 7, 5), (70_000,)]):
        base, of_tensor = inputs(gaussian, shape, 3, DTYPES[1 + i % 3])
        bases.append(base)
        experts.append(of_tensor)
    listed = [expert for of_tensor in experts for expert in of_tensor]
    by_expert = [list(of_expert) for of_expert in zip(*experts, strict=True)]
    assert_same(op(bases, listed, 3, axis), reference.scope_gram(bases, by_expert, axis=axis))
    assert_same(op([], listed, 3, axis), reference.scope_gram(None, by_expert, axis=axis))


def test_a_model_adds_up_its_tensors_in_halves() -> None:
    experts = [inputs(gaussian, (50, n), 2, torch.float32)[1] for n in range(1, 8)]
    listed = [expert for of_tensor in experts for expert in of_tensor]
    of_tensors = op([], listed, 2)
    assert_same(op([], listed, 2, "model"), fold_halves(of_tensors.permute(1, 2, 0))[None])


@given(st.lists(st.integers(0, 80), min_size=1, max_size=6), st.integers(1, 9), st.randoms(use_true_random=False))
def test_properties(sizes: list[int], num_tasks: int, random: Any) -> None:
    number = sum(sizes)
    x = torch.randn(num_tasks, number, generator=generator(sizes, num_tasks))
    products = gram(None, x)
    assert torch.equal(products, products.T)
    largest = products.diagonal().max().item()
    assert torch.linalg.eigvalsh(products).min() >= -1e-12 * largest
    order = torch.tensor(random.sample(range(num_tasks), num_tasks))
    assert_same(gram(None, x[order]), products[order][:, order])
    parts = [part for of_tensor in zip(*(row.split(sizes) for row in x), strict=True) for part in of_tensor]
    torch.testing.assert_close(op([], parts, num_tasks, "model")[0], products, rtol=0, atol=1e-12 * largest)


def test_nonfinite_values() -> None:
    base, experts = inputs(grid, (10, 10), 3, torch.float32)
    experts[1][0, [3, 5]] = torch.tensor([math.nan, -math.inf])
    for axis, nonfinite in itertools.product(AXES, ("drop", "propagate")):
        check(base, experts, axis=axis, nonfinite=nonfinite)
        check(None, experts, axis=axis, nonfinite=nonfinite)
    assert gram(base, experts, nonfinite="propagate").isnan().sum() == 5


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("which", "message"), NOT_FINITE.items())
def test_what_is_not_finite_is_named(which: str, message: str, axis: str) -> None:
    bases, experts = not_finite(which)
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        op(bases, experts, 2, axis, names=["a", "b"])
    unnamed = message.removesuffix(" in tensor 'b'")
    with pytest.raises(RuntimeError, match=f"^{re.escape(unnamed)}$"):
        gram(bases[1], experts[2:], axis=axis)


def test_task_vectors_that_only_their_dtype_cannot_hold() -> None:
    base, expert = torch.full((3,), -60_000.0).half(), torch.full((3,), 60_000.0).half()
    assert gram(base, [expert]).item() == 3 * 120_000.0**2
    with pytest.raises(RuntimeError, match=r"^experts\[0\] - base must be finite, got 3 overflows$"):
        gram(base, [expert], rounded=True)


def test_products_of_float64_may_overflow() -> None:
    experts = [torch.tensor([1e200, 1.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)]
    assert gram(None, experts).tolist() == [[math.inf, 1e200], [1e200, 5.0]]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"axis": "rows"}, ValueError, "axis must be one of 'tensor', 'row', 'column', 'model', got 'rows'"),
    ({"nonfinite": "skip"}, ValueError, "nonfinite must be one of 'error', 'propagate', 'drop', got 'skip'"),
    ({"experts": []}, ValueError, "experts must be at least one tensor, got none"),
    (
        {"experts": [torch.zeros(3)]},
        ValueError,
        "experts[0] must have the shape of base, (4,), got (3,)",
    ),
    (
        {"experts": [torch.zeros(4).half()]},
        ValueError,
        "experts[0] must have the dtype of base, torch.float32, got torch.float16",
    ),
    ({"experts": [[0.0] * 4]}, TypeError, "experts[0] must be a tensor, got list"),
]


@pytest.mark.any_isa
@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=str)
def test_refused_by_gram(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"base": torch.zeros(4), "experts": [torch.ones(4)], **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        gram(call.pop("base"), call.pop("experts"), **call)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be 1 or more, got 0"),
        ({"num_tasks": -2}, "num_tasks must be 1 or more, got -2"),
        (
            {"num_tasks": 3},
            "experts must be one tensor for every expert and merged tensor, got 2 for 3 experts",
        ),
        ({"experts": []}, "experts must be at least one tensor, got none"),
        ({"base": [torch.zeros(4)] * 2}, "base must be one tensor for every merged tensor, got 2 for 1"),
        ({"base": [torch.zeros(5)]}, "base must have the shape of experts[0], got another"),
        ({"axis": "rows"}, "axis must be one of 'tensor', 'row', 'column', 'model', got 'rows'"),
        ({"nonfinite": "skip"}, "nonfinite must be one of 'error', 'propagate', 'drop', got 'skip'"),
        (
            {"base": [], "experts": [torch.zeros(4).long()] * 2},
            "experts must be float64, float32, float16 or bfloat16, got another dtype",
        ),
    ],
    ids=str,
)
def test_refused_by_the_op(change: dict[str, Any], message: str) -> None:
    call = {"base": [torch.zeros(4)], "experts": [torch.ones(4)] * 2, "num_tasks": 2, **change}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        op(**call)


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
@pytest.mark.parametrize("axis", AXES)
def test_determinism(axis: str) -> None:
    for dtype, num_tasks in itertools.product(DTYPES, (2, 7)):
        base, experts = inputs(gaussian, (4_100, 40), num_tasks, dtype)
        results = []
        for isa, threads in itertools.product(_C.isas(), (1, 2, 3)):
            _C.set_isa(isa)
            torch.set_num_threads(threads)
            results.append(bits(gram(base, experts, axis=axis, rounded=True)))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.any_isa
def test_memory(run_python: Callable[..., str]) -> None:
    for axis in ("tensor", "column"):
        beyond = int(run_python("-m", "tests.peak_memory", "gram", "bfloat16", json.dumps({"axis": axis})))
        assert beyond < INPUT_BYTES // 4 - INPUT_BYTES  # what is subtracted as an output


@pytest.mark.any_isa
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
def test_opcheck(with_base: bool, axis: str) -> None:
    bases, experts = [], []
    for shape in ((10, 7), (3, 2, 5), (4,)):
        base, of_tensor = inputs(gaussian, shape, 2, torch.float32)
        bases.append(base)
        experts += of_tensor
    torch.library.opcheck(op, (bases if with_base else [], experts, 2, axis), {"names": ["a", "b", "c"]})


@pytest.mark.any_isa
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool) -> None:
    def cosines(base: Tensor, experts: list[Tensor]) -> Tensor:
        products = gram(base, experts, axis="row")
        lengths = products.diagonal(dim1=1, dim2=2).sqrt()
        return products / (lengths[:, :, None] * lengths[:, None])

    torch.compiler.reset()
    compiled = torch.compile(cosines, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (30, 11):
        base, experts = inputs(gaussian, (rows, 20), 3, torch.float32)
        assert_same(compiled(base, experts), cosines(base, experts))


@pytest.mark.any_isa
def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    with torch.device("meta"):
        experts = torch.empty(4, 7, 3, 5, dtype=torch.bfloat16)
    for axis, shape in (("tensor", (4, 4)), ("row", (21, 4, 4)), ("column", (15, 4, 4)), ("model", (1, 4, 4))):
        products = gram(None, experts, axis=axis)
        assert (tuple(products.shape), products.dtype, products.device.type) == (shape, torch.float64, "meta")
