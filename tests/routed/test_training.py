"""Routers that learn from unlabeled inputs: the entropy falls, and nothing but routers moves."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.routed import WEMoE, fit_by_entropy, fit_router, twin_merging, wemoe
from tests.encoders import samples
from tests.routed.test_models import case_of

pytestmark = pytest.mark.any_isa

INPUTS = {"task0": samples(10, 3, 8, 8, seed=1), "task1": samples(12, 3, 8, 8, seed=2) + 1}


def model_of() -> WEMoE:
    one, experts = case_of()
    return wemoe(one.model, experts)


def entropy(model: WEMoE) -> float:
    with torch.no_grad():
        logits = torch.cat([model(inputs) for inputs in INPUTS.values()])
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_entropy_falls_and_only_routers_move(per_sample: bool) -> None:
    model = model_of()
    before, start = deepcopy(model.state_dict()), entropy(model)
    losses = fit_by_entropy(model, INPUTS, steps=12, lr=3e-3, batch_size=6, per_sample=per_sample)
    assert losses.shape == (12,) and losses.dtype == torch.float64
    assert entropy(model) < start - 0.02
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if ".router." in name}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_is_the_same_fit() -> None:
    one, experts = case_of()

    def weights(**options: Any) -> Tensor:
        model = wemoe(one.model, experts)
        fit_by_entropy(model, INPUTS, steps=2, lr=1e-3, batch_size=4, **options)
        return torch.cat([p.detach().flatten() for router in model.routers for p in router.parameters()])

    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights(seed=1))
    with torch.inference_mode():
        assert torch.equal(weights(), weights())


def test_every_task_may_have_a_head_of_its_own() -> None:
    seen = []

    def classify(outputs: Tensor, task: str) -> Tensor:
        seen.append((task, outputs.shape))
        return outputs[:, :5]

    fit_by_entropy(model_of(), INPUTS, classify, steps=1, batch_size=4)
    assert seen == [("task0", (4, 16)), ("task1", (4, 16))]


def test_a_router_sees_every_form_of_samples() -> None:
    one, experts = case_of(num_experts=2)
    pixels = {"task0": INPUTS["task0"], "task1": INPUTS["task1"]}
    as_batches = {task: [(x, torch.zeros(len(x))) for x in of_task.split(5)] for task, of_task in pixels.items()}
    results = []
    for inputs in (pixels, as_batches):
        model = twin_merging(one.model, experts)
        results.append(fit_router(model, inputs, steps=3, hidden=7))
        assert model.configuration["router"] == [16, 7]
    torch.testing.assert_close(*results, rtol=1e-3, atol=0)  # products of other batches may be rounded otherwise


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be 1 or greater, got 0"),
        ({"lr": 0}, ValueError, "lr must be finite and greater than 0, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or greater, got 0"),
        (
            {"classify": lambda outputs, task: outputs * torch.nan},
            RuntimeError,
            "entropy must be finite, got nan at step 0",
        ),
    ],
)
def test_errors_of_the_entropy(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_by_entropy(model_of(), INPUTS, **{"steps": 1} | options)


def test_errors_of_modes_and_counts() -> None:
    one, experts = case_of(num_experts=1)
    with pytest.raises(ValueError, match="model must be in evaluation mode, got training mode"):
        fit_by_entropy(model_of().train(), INPUTS)
    model = twin_merging(one.model, experts)
    with pytest.raises(ValueError, match="inputs must hold at least one sample of every task and two"):
        fit_router(model, {"task0": INPUTS["task0"][:1]})
    with pytest.raises(ValueError, match="batch_size must be 2 or greater, got 1"):
        fit_router(model, {"task0": INPUTS["task0"]}, batch_size=1)
