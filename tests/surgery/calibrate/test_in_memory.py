"""calibrate against its formulas written out for one transformer in float64, and at its edges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import calibrate
from tests.adapter_cases import calls_of
from tests.encoders import CASES, Case, made, perturbed, samples
from tests.fits import refusal
from tests.surgery.calibrate import formulas
from tests.surgery.calibrate.models import TASKS, encoder_of
from tests.surgery.test_attach import called

pytestmark = pytest.mark.any_isa


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lam": 1e-4, "anchor": 1.0, "teacher": 1.0},
        {"lam": 0.3, "anchor": -1.0, "teacher": 0.0, "unread_weight": 1.0},
        {"unread_weight": 0.0},
        {"order": "layer", "teacher": 0.6},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [3, 16])
def test_the_formulas(models: Any, options: dict[str, Any], batch_size: int) -> None:
    merged, base, experts, batches = models
    expected = formulas.featcal(merged, base.state_dict(), experts, batches, **options)
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    result = calibrate(merged, base, experts, batches, batch_size=batch_size, progress=False, **options)
    assert list(result.state) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert len(result.solved) == 2 * 6 + 2 and result.kept == ()
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())
    moved = [name for name in before if not torch.equal(before[name], result.state[name])]
    assert moved == [name for name in before if name.startswith(("blocks.", "norm.", "projection."))]


def test_experts_equal_to_the_merge_are_a_fixed_point(models: Any) -> None:
    merged, base, _, batches = models
    experts = dict.fromkeys(TASKS, merged.state_dict())
    result = calibrate(merged, base, experts, batches, anchor=1.0, progress=False)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(result.state[name], value, rtol=0, atol=1e-6)


def test_one_expert_comes_back_where_there_are_data(models: Any) -> None:
    merged, base, experts, _ = models
    batches = {"a": samples(60, 8, 8).double()}
    near = {
        **merged.state_dict(),
        **{k: v for k, v in experts["a"].state_dict().items() if not k.startswith("blocks.")},
    }
    start = copy.deepcopy(merged)
    start.load_state_dict(near)
    alone = {"a": experts["a"]}
    result = calibrate(start, base, alone, batches, lam=1e-9, anchor=1.0, teacher=0.0, progress=False)
    start.load_state_dict(result.state)
    with torch.no_grad():
        torch.testing.assert_close(start(batches["a"]), experts["a"](batches["a"]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_model(case: Callable[[], Case]) -> None:
    """Every layer of the blocks is solved for."""
    it = made(case)
    experts = {task: perturbed(it.model, seed, 0.02) for seed, task in enumerate(TASKS)}
    merged = perturbed(it.model, 5, 0.01)
    result = calibrate(merged, it.model, experts, dict.fromkeys(TASKS, it.inputs), anchor=1.0, progress=False)
    assert result.kept == ()
    for name in [name for name, _ in merged.named_parameters() if name.startswith(it.blocks)]:
        assert not torch.equal(result.state[name], merged.state_dict()[name]), name
    calibrated = copy.deepcopy(merged)
    calibrated.load_state_dict(result.state)
    with torch.no_grad():
        before, after = (it.representation(called(m, it.inputs)) for m in (merged, calibrated))
    assert after.isfinite().all() and not torch.equal(before, after)


def test_layers_with_the_same_inputs_share_their_products() -> None:
    it = made(CASES[3])  # CLIP, whose queries, keys and values are layers of their own
    with calls_of("gram_cross") as calls:
        calibrate(it.model, it.model, {"a": it.model}, {"a": it.inputs}, progress=False)
    # six layers in each of two blocks and the projection; in the last block and behind it rows are not read alike
    assert len(calls) == 4 + 6 + 1


def test_padding_takes_no_part() -> None:
    it = made(CASES[6])
    assert isinstance(it.inputs, dict) and "attention_mask" in it.inputs
    experts = {task: perturbed(it.model, seed, 0.05) for seed, task in enumerate(TASKS)}
    inputs = it.inputs
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    states = [
        calibrate(it.model, it.model, experts, dict.fromkeys(TASKS, x), progress=False).state for x in (inputs, other)
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


class Tripled(nn.Module):
    """A normalisation whose class name says less than it does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * 3 * self.weight


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def normed(kind: Callable[[int], nn.Module]) -> nn.Module:
    return encoder_of(lambda: Normed(kind(8)))


def test_a_norm_that_computes_something_else_is_kept() -> None:
    kept = {}
    for kind in (nn.RMSNorm, type("OtherRMSNorm", (Tripled,), {})):
        model = normed(kind)
        experts = {task: perturbed(model, seed) for seed, task in enumerate(TASKS)}
        kept[kind.__name__] = calibrate(
            model, model, experts, dict.fromkeys(TASKS, samples(6, 5, 3).double()), progress=False
        ).kept
    unused = [f"blocks.{i}.unused.{name}" for i in range(2) for name in ("weight", "bias")]
    assert list(kept["RMSNorm"]) == unused
    assert sorted(kept["OtherRMSNorm"]) == sorted([*unused, "blocks.0.norm.weight", "blocks.1.norm.weight"])


def test_rms_norm_by_formula() -> None:
    model = normed(nn.RMSNorm)
    expert, x, lam = perturbed(model, 1), samples(6, 5, 3).double(), 0.2
    state = calibrate(model, model, {"a": expert}, {"a": x}, lam=lam, progress=False).state
    with torch.no_grad():
        u = model.embed(x).flatten(0, 1)
        z = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps)
        squares = z.square().mean(0)
        expected = (squares * expert.blocks[0].norm.weight + lam * model.blocks[0].norm.weight) / (squares + lam)
    torch.testing.assert_close(state["blocks.0.norm.weight"], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lam": 0.0}, "lam must be finite and greater than 0, got 0.0"),
        ({"anchor": torch.inf}, "anchor must be finite, got inf"),
        ({"teacher": 1.5}, "teacher must be in [0, 1], got 1.5"),
        ({"unread_weight": -0.1}, "unread_weight must be in [0, 1], got -0.1"),
        ({"order": "depth"}, "order must be one of 'block', 'layer', got 'depth'"),
        ({"residual": 1}, "residual must be True or False, got 1"),
        ({"batch_size": 0}, "batch_size must be 1 or greater, got 0"),
        ({"base": 3}, "base must be a module or a state dict, got int"),
        ({"base": {}}, "base must have 'blocks.0.norm1.weight' of shape (8,), got none"),
        ({"batches": {}}, "batches must have samples for every task of experts, got [] for ['a', 'b']"),
        (
            {"batches": {task: torch.full((4, 8, 8), torch.nan).double() for task in TASKS}},
            "inputs of 'blocks.0.norm1' in merged for task 'a' must be finite, got NaN",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(models: Any, wrong: dict[str, Any], message: str) -> None:
    merged, base, experts, batches = models
    call = {"base": base, "experts": experts, "batches": batches, "progress": False, **wrong}
    assert refusal(lambda: calibrate(merged, **call)) == message
