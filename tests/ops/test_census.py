"""census against the oracle: every count, and every sum to the bit."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from surgery_kernels.ops.census import census
from tests.cases import DTYPES, KINDS, NUM_TASKS, SHAPES, assert_same, gaussian, grid, inputs, option_id

op = torch.ops.surgery_kernels.census


def check(base: Tensor, experts: list[Tensor], thresholds: list[float] | None = None) -> None:
    expected = reference.census(base, experts, thresholds)
    found = dataclasses.asdict(census(base, experts, thresholds=thresholds))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(found[name], value, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, (9, 31), 4, dtype)
    check(base, experts)
    check(base, experts, [0.0, 0.01, 0.5, 1e30])


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [*SHAPES, (3 * 32_768 + 77,)], ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    check(base, experts, [0.5, 0.1, 0.0])


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, (7, 43), num_tasks, dtype)
        check(base, experts, [0.25] * num_tasks)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_odd_numbers(dtype: torch.dtype) -> None:
    """They are counted, and what is not finite changes nothing."""
    largest = torch.finfo(dtype).max
    base = torch.tensor([0.0, -0.0, 1, largest, torch.nan, torch.inf, 2, -largest] * 20, dtype=dtype)
    one = torch.tensor([1.0, 0, torch.nan, -largest, 1, torch.inf, 3, -largest] * 20, dtype=dtype)
    two = torch.tensor([-1.0, -0.0, 2, largest, 1, 1, 1, -torch.inf] * 20, dtype=dtype)
    check(base, [one, two], [0.0, 1.0])
    found = census(base, [one, two])
    assert found.nonfinite.tolist() == [40, 40, 20] and found.zeros.tolist() == [40, 20, 20]
    assert found.saturated.tolist() == [40, 40, 20]
    # raised and lowered; of the two that go beyond what the dtype holds, the change is not finite either
    assert found.changed.tolist()[1] == 60 and found.conflicts.item() == 40


def test_by_hand() -> None:
    base = torch.zeros(4)
    found = census(base, [torch.tensor([1.0, 2, 0, -1]), torch.tensor([-3.0, 1, 0, 0])], thresholds=2)
    assert found.changed.tolist() == [3, 2] and found.kept.tolist() == [1, 1] and found.touched == 3
    assert found.conflicts == 1 and found.lesser == 1 and found.mass.tolist() == [4, 4]
    assert (found.kept_by_any, found.kept_by_two, found.kept_conflicts) == (2, 0, 0)
    assert found.both.tolist() == [[3, 2], [2, 2]] and found.against.tolist() == [[0, 1], [1, 0]]


def test_layouts() -> None:
    base, experts = inputs(gaussian, (301, 133), 3, torch.bfloat16)
    expected = reference.census(base, experts)
    moved = [x.t().contiguous().t() for x in (base, *experts)]
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (base, *experts)]
    for of in (moved, shifted):
        for name, value in dataclasses.asdict(census(of[0], torch.stack(of[1:]))).items():
            assert_same(value, expected[name], name)


def test_any_number_of_threads(restored_threads: None) -> None:
    base, experts = inputs(gaussian, (400_001,), 3, torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(dataclasses.asdict(census(base, experts)))
    for name, value in found[0].items():
        assert_same(found[1][name], value, name)
        assert_same(found[2][name], value, name)


def test_opcheck() -> None:
    base, experts = inputs(gaussian, (5, 7), 2, torch.float32)
    limits = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    torch.library.opcheck(op, ([base], experts, 2, limits))
    torch.library.opcheck(op, ([base], experts, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "base must be a tensor, got None"),
        ({"thresholds": -1.0}, "thresholds must be 0 or greater, got -1.0"),
        ({"thresholds": [1.0]}, "thresholds must be .*, got 1"),
        ({"experts": []}, "experts must .*, got .*"),
    ],
    ids=str,
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    base, experts = inputs(gaussian, 5, 2, torch.float32)
    given: dict[str, Any] = {"base": base, "experts": experts, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        census(given.pop("base"), given.pop("experts"), **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [torch.ones(2)], 1), "base must be one tensor for every merged tensor, got none"),
        (([torch.ones(2)], [torch.ones(2)], 0), "num_tasks must be 1 or more, got 0"),
        (
            ([torch.ones(2)], [torch.ones(2)], 1, torch.ones(1)),
            "thresholds must be contiguous float64 [tensors, num_tasks]",
        ),
        (([torch.ones(2)], [torch.ones(2)], 1, -torch.ones(1).double()), "thresholds must be 0 or greater, got -1"),
    ],
    ids=str,
)
def test_errors_of_the_op(arguments: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        op(*arguments)
