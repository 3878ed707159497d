"""Merges that depend on the denoising step."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import masks, merge_state_dicts
from surgery_kernels.merging import BySteps, extrapolate_and_decouple, merge_by_steps
from surgery_kernels.ops.masks import unpack

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]


def model(seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(37, 29, generator=generator).to(dtype)
    bias = torch.randn(29, generator=generator).to(dtype)
    return {"weight": weight, "tied": weight, "bias": bias, "steps": torch.tensor(3)}


def by_formula(base: Tensor, expert: Tensor, name: str, dynamics: float = 0.75, weight: float = 1.0) -> list[Tensor]:
    """The paper's code step by step, in float64, with our masks."""
    bits, _ = masks(base, [expert, expert], density=0.3, seed=5, tensor_id=zlib.crc32(name.encode()))
    keep = unpack(bits, base.shape).double() / 0.3 if base.dim() > 1 else torch.ones(2, *base.shape)
    b, s = base.double(), expert.double()
    dyn = b + 0.25 * (b - s)
    return [b + dynamics * keep[0] * (dyn - b), weight * s + 0.25 * keep[1] * (s - b)]


@pytest.mark.parametrize("weight", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_edg(dtype: torch.dtype, weight: float) -> None:
    base, expert = model(0, dtype), model(1, dtype)
    result = extrapolate_and_decouple(base, expert, expert_weight=weight, seed=5)
    for name in ("weight", "bias"):
        expected = by_formula(base[name], expert[name], name, weight=weight)
        for step, wanted in zip((501, 500), expected, strict=True):
            found = result.at(step)[name]
            assert found.dtype == dtype
            rounding = torch.finfo(dtype).eps * (2 if weight == 1 else 4)
            torch.testing.assert_close(
                found.double(), wanted, rtol=rounding, atol=8 * rounding if weight != 1 else 1e-6
            )


def test_edg_by_hand() -> None:
    base, expert = {"w": torch.tensor([[1.0]])}, {"w": torch.tensor([[3.0]])}
    result = extrapolate_and_decouple(base, expert, density=1.0, dynamics=1.0)
    assert result.at(1000)["w"].item() == 0.5 and result.at(0)["w"].item() == 3.5


def test_edg_draws_twice_and_alike_in_every_run() -> None:
    base = {"w": torch.zeros(60, 50)}
    expert = {"w": torch.ones(60, 50)}
    early, late = (extrapolate_and_decouple(base, expert, seed=1).at(step)["w"] for step in (900, 100))
    kept = early != 0, late != 1
    assert all(0.25 < float(k.double().mean()) < 0.35 for k in kept)
    assert 0.05 < float((kept[0] & kept[1]).double().mean()) < 0.13
    again = extrapolate_and_decouple(base, expert, seed=1)
    assert torch.equal(again.at(900)["w"], early) and torch.equal(again.at(100)["w"], late)
    assert not torch.equal(extrapolate_and_decouple(base, expert, seed=2).at(900)["w"], early)


def test_edg_keeps_what_only_the_expert_has() -> None:
    base, expert = model(0), model(1) | {"adapter": torch.ones(3)}
    result = extrapolate_and_decouple(base, expert)
    for step in (1, 999):
        state = result.at(step)
        assert state["adapter"].tolist() == [1, 1, 1] and state["adapter"] is not expert["adapter"]
        assert state["tied"] is state["weight"] and state["steps"].item() == 3
        assert list(state) == [*base, "adapter"]
    unchanged = extrapolate_and_decouple(base, base)
    assert all(torch.equal(unchanged.at(step)[name], base[name]) for step in (1, 999) for name in base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extrapolation": math.inf}, "^extrapolation must be finite, got inf$"),
        ({"boundary": math.nan}, "^boundary must be finite, got nan$"),
        ({"density": 0.0}, r"^density must be in \(0, 1\], got 0.0$"),
        ({"seed": 1 << 64}, "^seed must have 64 bits, got "),
    ],
)
def test_edg_checks_its_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extrapolate_and_decouple(model(0), model(1), **options)


def test_edg_refuses_models_that_differ() -> None:
    with pytest.raises(ValueError, match=r"^experts\[0\] must have the names of base, got no 'bias'$"):
        extrapolate_and_decouple(model(0), {name: x for name, x in model(1).items() if name != "bias"})
    with pytest.raises(RuntimeError, match="must be finite"):
        extrapolate_and_decouple(model(0), model(1) | {"bias": torch.full((29,), torch.nan)})


def test_stages_are_merges_from_one_read() -> None:
    base, experts = model(0), [model(1), model(2)]
    table = {600: [0.5, 0.0], 200: [0.25, 0.25], 0: [0.0, -1.0]}
    result = merge_by_steps(base, experts, table)
    for step, weights in (
        (1000, [0.5, 0.0]),
        (601, [0.5, 0.0]),
        (600, [0.25, 0.25]),
        (200, [0.0, -1.0]),
        (0, [0.0, -1.0]),
    ):
        expected = merge_state_dicts(base, experts, method="task_arithmetic", lam=1.0, weights=weights)
        found = result.at(step)
        assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
        assert found["tied"] is found["weight"]
    assert isinstance(result, BySteps) and list(result.states) == [600, 200, 0]


def test_stages_are_checked() -> None:
    base, expert = model(0), model(1)
    with pytest.raises(ValueError, match="^coefficients must be of at least one stage, got none$"):
        merge_by_steps(base, [expert], {})
    with pytest.raises(ValueError, match=r"^coefficients must be one number or one per expert \(1\), got 2$"):
        merge_by_steps(base, [expert], {0: [1.0, 2.0]})
    with pytest.raises(ValueError, match="^experts must be at least one state dict, got none$"):
        merge_by_steps(base, [], {0: []})
