"""gram on CUDA tensors: the Triton kernel against the oracle and against the bits of the CPU."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import (
    DTYPES,
    KINDS,
    NOT_FINITE,
    SHAPES,
    assert_same,
    bits,
    gaussian,
    grid,
    inputs,
    not_finite,
    option_id,
)
from tests.guards import Counted, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

op = torch.ops.surgery_kernels.gram

AXES = ["tensor", "row", "column", "model"]


def triton_gram(gpu: torch.device, base: list[Tensor], experts: list[Tensor], num_tasks: int, **options: Any) -> Tensor:
    from surgery_kernels.triton.gram import gram

    shift = options.pop("shift", 0)
    moved = [[guarded(x, gpu, shift) for x in tensors] for tensors in (base, experts)]
    return gram(*moved, num_tasks, **options).cpu()


def check(gpu: torch.device, base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    """Against the oracle; and the bits of the CPU, which tell -0 from 0."""
    bases = [] if base is None else [base]
    products = triton_gram(gpu, bases, experts, len(experts), **options)
    options.pop("shift", None)
    expected = reference.gram(base, experts, **options)
    assert_same(products, expected[None] if options.get("axis", "tensor") == "tensor" else expected, str(options))
    if not expected.isnan().any():
        assert torch.equal(bits(products), bits(op(bases, experts, len(experts), **options)))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(kind, (3, 41), 4, dtype)
    check(gpu, base, experts, rounded=True)
    check(gpu, base, experts, axis="column")
    check(gpu, None, experts, axis="row")


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (20_001,)] + [(0, 3), (3, 0), (65, 33)], ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, shape, 2, dtype)
    for i, axis in enumerate(AXES):
        check(gpu, base, experts, axis=axis, shift=i)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20, 33])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    for dtype, axis in itertools.product((torch.float32, torch.float64), ("tensor", "row", "column")):
        base, experts = inputs(gaussian, (2, 33), num_tasks, dtype)
        check(gpu, base, experts, axis=axis)


@pytest.mark.parametrize("held", [1 << 21, 17], ids=["at-once", "in-turn"])
def test_vectors_of_many_pieces(held: int, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and runs of few elements, so that the interpreter comes to an end: sums of both are those of the CPU's
    whole blocks, added up in the same order."""
    from surgery_kernels.triton import gram

    monkeypatch.setattr(gram, "SUM_BLOCK", 64)
    monkeypatch.setattr(gram, "RUN", 3)
    monkeypatch.setattr(gram, "HELD", held)
    kernel = Counted(gram._add)
    monkeypatch.setattr(gram, "_add", kernel)
    base, experts = inputs(gaussian, (11 * 64 + 7,), 2, torch.float32)
    blocks = [x.split(64) for x in (base, *experts)]
    of_blocks = [op([part], parts, 2) for part, *parts in zip(*blocks, strict=True)]
    expected = reference.sums.fold_halves(torch.cat(of_blocks).permute(1, 2, 0))
    assert_same(triton_gram(gpu, [base], experts, 2)[0], expected)
    assert kernel.launches == (1 if held > 17 else 4)  # twelve places, or three of them four times
    base, experts = inputs(gaussian, (7 * 3 + 1, 5), 2, torch.float32)
    runs = [x.split(3) for x in (base, *experts)]
    of_runs = [op([part], parts, 2, "column") for part, *parts in zip(*runs, strict=True)]
    expected = reference.sums.fold_halves(torch.stack(of_runs).movedim(0, -1))
    assert_same(triton_gram(gpu, [base], experts, 2, axis="column"), expected)


@pytest.mark.parametrize("axis", AXES)
def test_several_tensors_of_several_dtypes(axis: str, gpu: torch.device) -> None:
    bases, experts = [], []
    for i, shape in enumerate([(4, 33), (0,), (5,), (), (3, 7, 5)]):
        base, of_tensor = inputs(gaussian, shape, 3, DTYPES[1 + i % 3])
        bases.append(base)
        experts += of_tensor
    assert_same(triton_gram(gpu, bases, experts, 3, axis=axis), op(bases, experts, 3, axis))


def test_layouts(gpu: torch.device) -> None:
    from surgery_kernels.triton.gram import gram

    base, experts = inputs(gaussian, (31, 33), 3, torch.float32)
    moved = [x.to(gpu).t().contiguous().t() for x in (base, *experts)]
    assert_same(gram(moved[:1], moved[1:], 3, "row").cpu(), reference.gram(base, experts, axis="row"))


def test_nonfinite_values(gpu: torch.device) -> None:
    base, experts = inputs(grid, (10, 10), 3, torch.float32)
    experts[1][0, [3, 5]] = torch.tensor([math.nan, -math.inf])
    for axis, nonfinite in itertools.product(("tensor", "column"), ("drop", "propagate")):
        check(gpu, base, experts, axis=axis, nonfinite=nonfinite)


@pytest.mark.parametrize(("which", "message"), NOT_FINITE.items())
def test_what_is_not_finite_is_named(which: str, message: str, gpu: torch.device) -> None:
    bases, experts = not_finite(which)
    for axis in ("model", "column"):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            triton_gram(gpu, bases, experts, 2, axis=axis, names=["a", "b"])


def test_what_overflows_elsewhere_is_no_error(gpu: torch.device) -> None:
    half = [torch.full((3,), sign * 60_000.0).half() for sign in (-1, 1)]
    assert triton_gram(gpu, half[:1], half[1:], 1).item() == 3 * 120_000.0**2
    assert triton_gram(gpu, [], [torch.tensor([1e200], dtype=torch.float64)], 1).item() == math.inf


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_tasks": 0}, RuntimeError, "num_tasks must be 1 or more, got 0"),
        (
            {"num_tasks": 3},
            RuntimeError,
            "experts must be one tensor for every expert and merged tensor, got 2 for 3 experts",
        ),
        ({"axis": "rows"}, ValueError, "axis must be one of 'tensor', 'row', 'column', 'model', got 'rows'"),
        ({"nonfinite": "skip"}, ValueError, "nonfinite must be one of 'error', 'propagate', 'drop', got 'skip'"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], error: type[Exception], message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.gram import gram

    call = {"num_tasks": 2, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        gram([torch.zeros(4, device=gpu)], [torch.ones(4, device=gpu)] * 2, **call)
