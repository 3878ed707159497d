"""gram_cross against the oracle: to the bit where sums are exact, else by the size of its errors."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, gram_cross, reference
from tests.cases import DTYPES, assert_same, bits, generator, option_id

op = torch.ops.surgery_kernels.gram_cross

RUN = 512  # rows that are added up before they meet others
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (3, 70, 64, 64), (1, 33, 65, 63), (2, RUN + 1, 129, 20), (1, 2 * RUN + 5, 20, 70)]


def exact(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/64, whose products and sums are exact."""
    return (torch.randint(-64, 65, shape, generator=generator(shape)) / 64).to(dtype)


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and weights, some of them 0."""
    num_tasks, rows, dim, y_dim = shape
    weights = torch.randint(0, 4, (num_tasks, rows), generator=generator(shape)) / 2
    return exact(num_tasks, rows, dim, dtype=dtype), exact(num_tasks, rows, y_dim, dtype=dtype), weights


def check(*arguments: Any, **options: Any) -> None:
    results, expected = gram_cross(*arguments, **options), reference.gram_cross(*arguments, **options)
    for name, actual, wanted in zip(results._fields, results, expected, strict=True):
        if wanted is None:
            assert actual is None
        else:
            assert_same(actual, wanted, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, weights = problem(shape, dtype)
    for compute in (None, torch.float64):
        for of_rows in (None, weights, weights.double()):
            check(x, y, weights=of_rows, dtype=compute)
        check(x, weights=weights, dtype=compute)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_ragged_tasks(dtype: torch.dtype) -> None:
    x, y, weights = (tensor[0] for tensor in problem((1, 2 * RUN + 77, 70, 10), dtype))
    for offsets in ([0, len(x)], [0, 0, 3, 3, RUN + 9, len(x), len(x)], [0, RUN, len(x)]):
        check(x, y, offsets=offsets)
        check(x, y, offsets=offsets, weights=weights)
        check(x, offsets=offsets, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2), (2, 5, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x, y, weights = problem(shape)
    check(x, y, weights=weights)
    check(x)
    if shape[0]:
        check(x[0], y[0], offsets=[0, shape[1]])
    check(x.new_empty(0, 3), offsets=[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=option_id)
def test_errors_are_those_of_rounding(dtype: torch.dtype) -> None:
    """Against float64; for the order of the sums the error may grow like the square root of the number of rows."""
    rows, g = 3_000, generator(dtype)
    x, y = (torch.randn(2, rows, 130, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    weights = torch.rand(2, rows, generator=g, dtype=torch.float64)
    for compute in (None, torch.float64):
        results = gram_cross(x, y, weights=weights, dtype=compute)
        rounded = weights.to(results.gram.dtype)
        for actual, wanted in zip(
            results, reference.gram_cross(x, y, weights=rounded, dtype=torch.float64), strict=True
        ):
            error = float((actual.double() - wanted).abs().max() / wanted.abs().max())
            assert error <= torch.finfo(actual.dtype).eps * rows**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_layouts(dtype: torch.dtype) -> None:
    x, y, weights = problem((3, 70, 65, 33), dtype)
    expected = gram_cross(x, y, weights=weights)
    wider = [torch.cat([z, z], dim=-1)[..., 1 : z.shape[-1] + 1] for z in (x.roll(1, -1), y.roll(1, -1))]
    for moved in (
        [z.transpose(0, 1).contiguous().transpose(0, 1) for z in (x, y)],  # token-major
        [z.mT.contiguous().mT for z in (x, y)],
        [torch.cat([z, z], dim=-1)[..., : z.shape[-1]] for z in (x, y)],
    ):
        results = gram_cross(*moved, weights=weights.T.contiguous().T)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results, expected, strict=True))
    for a, b in zip(gram_cross(*wider), reference.gram_cross(*wider), strict=True):
        assert_same(a, b)
    check(x[:1].expand(3, -1, -1), y[:, :1].expand(-1, 70, -1))


def test_the_matrix_is_symmetric_to_the_bit() -> None:
    x = torch.randn(2, 700, 200, generator=generator(0))
    for weights in (None, torch.rand(2, 700, generator=generator(1))):
        assert torch.equal(*(lambda gram: (gram, gram.mT))(gram_cross(x, weights=weights).gram))


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=option_id)
def test_threads_and_neighbours(dtype: torch.dtype) -> None:
    """The same bits on any number of threads, and those of a task alone."""
    g = generator(dtype)
    x, y = (torch.randn(5, 1_700, 200, generator=g).to(dtype) for _ in range(2))
    weights = torch.rand(5, 1_700, generator=g)
    for isa in _C.isas()[-2:]:
        _C.set_isa(isa)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(gram_cross(x, y, weights=weights))
        results.append([torch.cat(r) for r in zip(*(gram_cross(x[t : t + 1], y[t : t + 1], weights=weights[t : t + 1])
                                                    for t in range(5)), strict=True)])  # fmt: skip
        flat = (z.flatten(0, 1) for z in (x, y, weights))
        results.append((lambda x, y, weights: gram_cross(x, y, weights=weights, offsets=range(0, 8_501, 1_700)))(*flat))
        for other in results[1:]:
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(other, results[0], strict=True))


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa")
def test_instruction_sets_agree_where_sums_are_exact() -> None:
    x, y, weights = problem((2, 700, 70, 33))
    for isa in _C.isas():
        _C.set_isa(isa)
        check(x, y, weights=weights)


def test_a_row_of_weight_zero_may_hold_anything() -> None:
    x, y, weights = problem((2, 9, 5, 4))
    weights[:, 3] = 0
    expected = gram_cross(x, y, weights=weights)
    x[0, 3], y[1, 3] = math.nan, math.inf
    for actual, wanted in zip(gram_cross(x, y, weights=weights), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_rows_reach_their_columns(value: float) -> None:
    x, y, _ = problem((2, 9, 70, 4))
    x[1, 3, 66] = value
    gram, cross, x_sums, y_sums = gram_cross(x, y)
    assert gram[0].isfinite().all() and cross[0].isfinite().all() and x_sums[0].isfinite().all()
    reached = ~gram[1].isfinite()
    assert reached[66].sum() >= 69 and torch.equal(reached, reached.T)  # 0 times infinity is NaN
    assert reached[:66, :66].sum() == 0
    assert not cross[1, 66].isfinite().any() and y_sums.isfinite().all()


@pytest.mark.any_isa
def test_no_gradient() -> None:
    x = torch.ones(1, 2, 3, requires_grad=True)
    assert not any(result.requires_grad for result in gram_cross(x, x, weights=torch.ones(1, 2, requires_grad=True)))


X, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"y": 1.0}, TypeError, "y must be a tensor, got float"),
        ({"x": X[0]}, ValueError, "x must be [num_tasks, rows, dim], got (3, 5)"),
        ({"offsets": [0, 3]}, ValueError, "x must be [rows, dim], got (2, 3, 5)"),
        ({"y": Y[0]}, ValueError, "y must be [num_tasks, rows, dim], got (3, 4)"),
        ({"x": X.long()}, ValueError, "x must be float64, float32, float16 or bfloat16, got torch.int64"),
        ({"y": Y.half()}, ValueError, "y must have the dtype of x, torch.float32, got torch.float16"),
        ({"y": Y.to("meta")}, ValueError, "y must be on the device of x, cpu, got meta"),
        ({"y": Y[:, :2]}, ValueError, "y must have the rows of x, (2, 3), got (2, 2)"),
        ({"weights": 1.0}, TypeError, "weights must be a tensor, got float"),
        ({"weights": torch.ones(2, 3).half()}, ValueError, "weights must be float32 or float64, got torch.float16"),
        ({"weights": torch.ones(3)}, ValueError, "weights must be [2, 3], one for every row of x, got [3]"),
        ({"weights": torch.ones(2, 3, device="meta")}, ValueError, "weights must be on the device of x, cpu, got meta"),
        ({"dtype": torch.float16}, ValueError, "dtype must be float32 or float64, got torch.float16"),
        (
            {"x": X.double(), "y": None, "dtype": torch.float32},
            ValueError,
            "dtype must be float64 for float64 features, got torch.float32",
        ),
        (
            {"x": X[0], "y": None, "offsets": torch.tensor([0, 3])},
            TypeError,
            "offsets must be a list of integers, got tensor([0, 3])",
        ),
        ({"x": X[0], "y": None, "offsets": [0, 1.5]}, TypeError, "offsets must be a list of integers, got [0, 1.5]"),
        *(
            (
                {"x": X[0], "y": None, "offsets": offsets},
                ValueError,
                f"offsets must rise from 0 to the rows of x, 3, got {offsets}",
            )
            for offsets in ([], [1, 3], [0, 2], [0, 2, 1, 3])
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"x": X, "y": Y, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        gram_cross(call.pop("x"), call.pop("y"), **call)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, "x must be [num_tasks, rows, dim], got 2 dimensions"),
        ({"offsets": [0, 3]}, "x must be [rows, dim], got 3 dimensions"),
        ({"x": X.long()}, "x must be float64, float32, float16 or bfloat16, got another dtype"),
        ({"y": Y.half()}, "y must have the dtype of x, got another"),
        ({"y": Y[:1]}, "y must have the rows of x, got others"),
        ({"y": Y[:, :2]}, "y must have the rows of x, got others"),
        ({"weights": torch.ones(2, 3).double()}, "weights must be float32 on the CPU, got another tensor"),
        ({"weights": torch.ones(2, 3), "wide": True}, "weights must be float64 on the CPU, got another tensor"),
        ({"weights": torch.ones(6)}, "weights must be one for every row of x, got another shape"),
        *(
            (
                {"x": X[0], "y": None, "offsets": offsets},
                "offsets must rise from 0 to the rows of x, 3, got another list",
            )
            for offsets in ([], [1, 3], [0, 2], [0, 2, 1, 3])
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_by_the_op(change: dict[str, Any], message: str) -> None:
    call = {"x": X, "y": Y, **change}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        op(**call)


@pytest.mark.any_isa
def test_opcheck() -> None:
    x, y, weights = problem((2, 9, 5, 4))
    torch.library.opcheck(op, (x, y, weights))
    torch.library.opcheck(op, (x.half(), None, weights.double(), None, True))
    torch.library.opcheck(op, (x[0], y[0], weights[0], [0, 0, 5, 9]))


@pytest.mark.any_isa
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool) -> None:
    def solve(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        gram, cross, x_sums, _ = gram_cross(x, y, weights=weights)
        ragged = gram_cross(x[0], offsets=[0, 4, x.shape[1]])
        return torch.linalg.solve(gram + 64 * torch.eye(5), cross) + x_sums[..., None] + ragged.x_sums[..., None]

    torch.compiler.reset()
    compiled = torch.compile(solve, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (9, 12):
        arguments = problem((2, rows, 5, 4))
        assert_same(compiled(*arguments), solve(*arguments))


@pytest.mark.any_isa
def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    with torch.device("meta"):
        x, y = torch.empty(3, 7, 5, dtype=torch.bfloat16), torch.empty(3, 7, 4, dtype=torch.bfloat16)
    shapes = ((3, 5, 5), (3, 5, 4), (3, 5), (3, 4))
    for dtype, results in itertools.product([None, torch.float64], [gram_cross]):
        of_call = results(x, y, dtype=dtype)
        assert [(tuple(r.shape), r.dtype) for r in of_call] == [(shape, dtype or torch.float32) for shape in shapes]
    assert gram_cross(x[0], offsets=[0, 2, 7]).gram.shape == (2, 5, 5)
