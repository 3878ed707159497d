"""RegMean++ against its formula, written out for one transformer in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery_kernels.surgery import regmean_plus_plus
from tests.encoders import CASES, made, perturbed
from tests.fits import refusal
from tests.surgery.calibrate import formulas
from tests.surgery.calibrate.models import TASKS

pytestmark = pytest.mark.any_isa


@pytest.mark.parametrize("off_diagonal", [0.9, 0.5, 1.0])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_the_formula(models: Any, off_diagonal: float, batch_size: int) -> None:
    merged, _, experts, batches = models
    expected = formulas.regmean_plus_plus(merged, experts, batches, off_diagonal)
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    state = regmean_plus_plus(
        merged, experts, batches, off_diagonal=off_diagonal, batch_size=batch_size, progress=False
    )
    assert list(state) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-7, msg=name)
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


def test_one_expert_comes_back(models: Any) -> None:
    merged, _, experts, batches = models
    state = regmean_plus_plus(merged, {"a": experts["a"]}, {"a": batches["a"]}, progress=False)
    for name in ("blocks.0.qkv.weight", "blocks.1.contract.weight"):
        torch.testing.assert_close(state[name], experts["a"].get_parameter(name))
    assert torch.equal(state["blocks.0.norm1.weight"], merged.blocks[0].norm1.weight)


def test_padding_takes_no_part() -> None:
    it = made(CASES[6])
    assert isinstance(it.inputs, dict)
    experts = {task: perturbed(it.model, seed, 0.05) for seed, task in enumerate(TASKS)}
    inputs = it.inputs
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    first, second = (
        regmean_plus_plus(it.model, experts, dict.fromkeys(TASKS, x), progress=False) for x in (inputs, other)
    )
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)


def test_refused(models: Any) -> None:
    merged, _, experts, batches = models
    call = {"experts": experts, "batches": batches, "progress": False}
    message = "off_diagonal must be in [0, 1], got 2.0"
    assert refusal(lambda: regmean_plus_plus(merged, **{**call, "off_diagonal": 2.0})) == message
    message = "batches must have samples for every task of experts, got [] for ['a', 'b']"
    assert refusal(lambda: regmean_plus_plus(merged, **{**call, "batches": {}})) == message
