"""Looks at the device that are put off until the end of a merge: errors stay, waits go."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery_kernels as sk
from surgery_kernels.ops import looks
from tests.cases import assert_same, gaussian, inputs

pytestmark = pytest.mark.any_isa

ops = torch.ops.surgery_kernels

Merge = tuple[list[Tensor], list[Tensor], list[Tensor], str]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many looks each wait for the device was for."""
    counted: list[int] = []
    fetch = looks._fetch

    def count(found: list[Tensor]) -> list[int]:
        counted.extend([len(found)] if found else [])
        return fetch(found)

    monkeypatch.setattr(looks, "_fetch", count)
    return counted


def problem(device: torch.device, name: str, size: int = 70, bad: int = 0) -> Merge:
    """bad: how many entries of the second expert are not finite."""
    base, experts = inputs(gaussian, size, 2, torch.float32)
    experts[1][:bad] = math.inf
    base, *experts = (x.to(device) for x in (base, *experts))
    return [base], experts, [torch.full_like(base, 7.0)], name


def merge(base: list[Tensor], experts: list[Tensor], out: list[Tensor], name: str, **options: Any) -> None:
    ops.ties_merge_out(base, experts, [0.2] * 2, **options, names=[name], out=out)


def test_one_wait_for_several_ops(device: torch.device, waits: list[int]) -> None:
    fine = [problem(device, f"layer.{i}", 60 + i) for i in range(3)]
    with looks.put_off(), looks.put_off():
        for one in fine:
            merge(*one)
        assert waits == []
    assert waits == [3]
    for base, experts, out, _ in fine:
        assert_same(out[0], sk.ties_merge(base[0], experts))
    assert waits == [3, 1, 1, 1]


def test_some_dozens_at_most_wait(device: torch.device, waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "TOGETHER", 2)
    with pytest.raises(RuntimeError, match="in tensor 'bad'$"), looks.put_off():
        merge(*problem(device, "fine"))
        merge(*problem(device, "bad", bad=1))
        pytest.fail("the second look was not the last of its dozens")
    assert waits == [2]


def test_the_first_that_found_something_tells(device: torch.device) -> None:
    bad = [problem(device, name, bad=count) for name, count in (("a", 0), ("b", 2), ("c", 3))]
    message = r"^experts\[1\] must be finite, got 2 NaN or infinite values in tensor 'b'$"
    with pytest.raises(RuntimeError, match=message), looks.put_off():
        for one in bad:
            merge(*one)
    for *_, out, _ in bad[1:]:
        assert (out[0] == 7).all(), "written, though its inputs are not finite"


def test_an_error_behind_it_yields(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"got 1 NaN or infinite values in tensor 'bad'$"), looks.put_off():
        merge(*problem(device, "bad", bad=1))
        raise ValueError("which follows from numbers nobody wrote")
    with pytest.raises(ValueError, match="of its own"), looks.put_off():
        merge(*problem(device, "fine"))
        raise ValueError("of its own")
    with pytest.raises(RuntimeError, match="in tensor 'at once'$"):  # no longer put off
        merge(*problem(device, "at once", bad=1))


def test_outputs_that_are_delivered_are_looked_at_first(device: torch.device, waits: list[int]) -> None:
    base, experts, _, name = problem(device, "bad", bad=1)
    out = torch.full((140,), 7.0, device=device)
    with looks.put_off():
        with pytest.raises(RuntimeError, match="in tensor 'bad'$"):
            merge(base, experts, [out[::2]], name)
        assert waits == [1]
    assert (out == 7).all()


def test_inputs_that_change_before_the_look(device: torch.device) -> None:
    base, experts, out, name = problem(device, "bad", bad=1)
    message = "^experts must stay as they are until they are merged, got some that became finite$"
    with pytest.raises(RuntimeError, match=message), looks.put_off():
        merge(base, experts, out, name)
        experts[1].zero_()


def test_sums_that_overflow_are_nothing_to_tell(device: torch.device) -> None:
    large = [torch.full((5,), 1e200, dtype=torch.float64, device=device) for _ in range(2)]
    assert sk.gram(None, large).isinf().all()
    large = [torch.full((5,), 1e308, dtype=torch.float64, device=device)]
    _, sums = ops.masks([], large, [0.5], nonfinite="error")
    assert sums.isinf().any()


def test_a_state_dict_is_one_wait(device: torch.device, waits: list[int]) -> None:
    base = {f"layer.{i}": torch.randn(40 + i, device=device) for i in range(4)}
    experts = [{name: x + 0.1 * torch.randn_like(x) for name, x in base.items()} for _ in range(2)]
    expected = {name: sk.ties_merge(x, [expert[name] for expert in experts]) for name, x in base.items()}
    waits.clear()
    merged = sk.merge_state_dicts(base, experts, scope="tensor")
    assert waits == [4]
    for name, tensor in expected.items():
        assert_same(merged[name], tensor)
    experts[0]["layer.2"][3] = math.nan
    message = r"^experts\[0\] must be finite, got 1 NaN or infinite values in tensor 'layer.2'$"
    with pytest.raises(RuntimeError, match=message):
        sk.merge_state_dicts(base, experts, scope="tensor")
