"""Methods that are linear in the models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import METHODS, wise_ft_curve
from tests.cases import assert_same, gaussian, grid, inputs

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

StateDict = dict[str, Tensor]


def model(count: int, num_tasks: int, dtype: torch.dtype = torch.float32) -> tuple[StateDict, list[StateDict]]:
    """Three layers and an embedding, with an integer buffer."""
    names = ["embed.weight", *(f"layers.{i}.weight" for i in range(3))]
    drawn = [inputs(grid, count + i, num_tasks, dtype) for i in range(len(names))]
    base = {name: x for name, (x, _) in zip(names, drawn, strict=True)}
    experts = [{name: of[t] for name, (_, of) in zip(names, drawn, strict=True)} for t in range(num_tasks)]
    steps = {"steps": torch.tensor(7)}
    return base | steps, [expert | steps for expert in experts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_tasks", [1, 4, 9, 33])  # torch adds eight weights or more in an order of its own
def test_linear_is_mergekits(dtype: torch.dtype, normalize: bool, num_tasks: int) -> None:
    weights = [[0.3, -0.2, 0.7, 1.1][t % 4] for t in range(num_tasks)]
    _, experts = inputs(gaussian, 20_001, num_tasks, dtype)
    expected = merge_tensors(experts, "linear", parameters={"weight": weights, "normalize": normalize})
    merged = merge_state_dicts(
        None, [{"w": expert} for expert in experts], method="linear", weights=weights, normalize=normalize
    )
    assert_same(merged["w"], expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_task_arithmetic_is_mergekits(dtype: torch.dtype) -> None:
    weights = [0.3, -0.2, 0.7]
    base, experts = inputs(gaussian, 20_001, 3, dtype)
    parameters = {"weight": weights, "lambda": 0.4, "normalize": True}
    expected = merge_tensors([base, *experts], "task_arithmetic", parameters=parameters, base_index=0)
    merged = merge_state_dicts(
        {"w": base},
        [{"w": expert} for expert in experts],
        method="task_arithmetic",
        weights=weights,
        lam=0.4,
        normalize=True,
        arithmetic="mergekit",
    )
    assert_same(merged["w"], expected)


def test_task_arithmetic_divides_by_the_weights() -> None:
    base, experts = model(65, 2)
    options: dict[str, Any] = {"method": "task_arithmetic", "weights": [3.0, 1.0]}
    half = merge_state_dicts(base, experts, lam=0.25, **options)
    same(merge_state_dicts(base, experts, normalize=True, **options), half)
    options["weights"] = [1.0, -1.0]
    same(merge_state_dicts(base, experts, normalize=True, **options), merge_state_dicts(base, experts, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wise_ft(dtype: torch.dtype) -> None:
    base, (expert,) = model(257, 1, dtype)
    ts = [0.0, 0.25, 1.0, 1.5]
    curve = wise_ft_curve(base, expert, ts)
    same(curve[0], base)
    same(curve[2], expert)
    for t, point in zip(ts, curve, strict=True):
        same(point, merge_state_dicts(base, [expert], method="wise_ft", t=t))
    assert wise_ft_curve(base, expert, []) == []
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    assert merge_state_dicts({"w": a}, [{"w": b}], method="wise_ft", t=0.25)["w"].tolist() == [1.5, 1.5]


def test_wise_ft_keeps_ties() -> None:
    tied, other = torch.ones(3), torch.zeros(3)
    (point,) = wise_ft_curve({"a": tied, "b": tied}, {"a": other, "b": other}, [0.5])
    assert point["a"].data_ptr() == point["b"].data_ptr()


def test_dni() -> None:
    _, experts = model(63, 2)
    merged = merge_state_dicts(None, experts, method="dni", weights=[0.25, 0.75])
    assert_same(merged["embed.weight"], 0.25 * experts[0]["embed.weight"] + 0.75 * experts[1]["embed.weight"])
    assert merged["steps"].item() == 7


def test_expo() -> None:
    base, experts = model(64, 2)
    merged = merge_state_dicts(base, experts, method="expo", extrapolation=0.5)
    mean = (experts[0]["embed.weight"] + experts[1]["embed.weight"]) / 2
    assert_same(merged["embed.weight"], base["embed.weight"] + 1.5 * (mean - base["embed.weight"]))


def test_lines() -> None:
    base, experts = model(64, 2)
    merged = merge_state_dicts(base, experts, method="lines", first=0.25, last=0.75, weights=[1.0, 2.0])
    scales = {"embed.weight": 0.25, "layers.0.weight": 0.25, "layers.1.weight": 0.5, "layers.2.weight": 0.75}
    for name, scale in scales.items():
        change = (experts[0][name] - base[name]) + 2 * (experts[1][name] - base[name])
        assert_same(merged[name], base[name] + scale * change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dni", "weights": [0.5, 0.25]}, "weights must have the sum 1 for dni, got [0.5, 0.25]"),
        ({"method": "dni"}, "weights must be given, got none"),
        ({"method": "wise_ft"}, "experts must be exactly 1 for wise_ft, got 2"),
        ({"method": "lines", "first": 0.1}, "last must be given, got none"),
        ({"method": "expo", "extrapolation": float("inf")}, "extrapolation must be finite, got inf"),
        (
            {"method": "average", "weights": [1.0, -1.0]},
            "weights must have a sum other than 0 unless normalize is false, got 1.0, -1.0",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(options: dict[str, Any], message: str) -> None:
    base, experts = model(3, 2)
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, **options)


def test_no_base() -> None:
    _, experts = model(3, 2)
    with pytest.raises(ValueError, match=r"^base must be given for ties, got None$"):
        merge_state_dicts(None, experts)


def same(actual: StateDict, expected: StateDict) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert_same(actual[name], tensor)


def test_every_method_is_declared_in_full() -> None:
    for name, method in METHODS.items():
        assert (method.name, method.summary().endswith(".")) == (name, True)
        assert method.title and method.formula and method.source and method.base in ("required", "optional", "none")
        assert method.decides in ("element", "tensor", "row", "scope", "model")
        assert all(parameter.meaning for parameter in method.parameters())
