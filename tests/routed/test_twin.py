"""Twin-Merging against its formula."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from surgery_kernels import merge_state_dicts
from surgery_kernels.routed import fit_router, twin_merging
from tests.encoders import BATCH, clip, open_clip, timm, vit
from tests.routed.test_models import case_of, features

pytestmark = pytest.mark.any_isa

LAM = 0.3


def formula(
    base: nn.Module,
    experts: dict[str, nn.Module],
    weights: Tensor,
    unrouted: tuple[str, ...],
    rank: int,
    inputs: Tensor,
) -> list[Any]:
    """The whole model merged for one sample after the other; `unrouted` is the shared model's."""
    states = [expert.state_dict() for expert in experts.values()]
    shared = merge_state_dicts(base.state_dict(), states, method="task_arithmetic", lam=LAM)
    linear = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    exclusive = []
    for state in states:
        of_task = {name: state[name] - x for name, x in shared.items()}
        for name in linear & set(of_task):
            u, s, vh = torch.linalg.svd(of_task[name], full_matrices=False)
            of_task[name] = (u[:, :rank] * s[:rank]) @ vh[:rank]
        exclusive.append({name: torch.zeros_like(x) if name in unrouted else x for name, x in of_task.items()})
    outputs = []
    for sample, of_sample in zip(inputs, weights, strict=True):
        merged = {
            name: x + sum(w * of_task[name] for w, of_task in zip(of_sample, exclusive, strict=True))
            for name, x in shared.items()
        }
        outputs.append(functional_call(base, merged, (sample[None],)))
    return outputs


@pytest.mark.parametrize("case", [timm, clip, vit])
def test_it_is_the_formula(case: Any) -> None:
    one, experts = case_of(case)
    one.model.double()
    experts = {task: expert.double() for task, expert in experts.items()}
    inputs, weights = one.inputs.double(), torch.randn(BATCH, 3, dtype=torch.float64).softmax(-1)
    model = twin_merging(one.model, experts, rank=4, lam=LAM)
    assert not any("attn" in name or "norm" in name or "patch_embed" in name for name in model.unrouted)
    with torch.no_grad():
        rows = formula(one.model, experts, weights, model.unrouted, 4, inputs)
        expected = torch.cat([one.representation(row) for row in rows])
        found = one.representation(model(inputs, weights=weights))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_router_finds_the_task_and_the_model_follows_it() -> None:
    one, experts = case_of()
    model = twin_merging(one.model, experts, rank=None)
    torch.manual_seed(0)
    patterns = 2 * torch.randn(3, 3, 8, 8)
    inputs = {task: patterns[t] + 0.3 * torch.randn(24, 3, 8, 8) for t, task in enumerate(experts)}
    losses = fit_router(model, inputs, steps=60, lr=5e-3)
    assert losses.shape == (60,) and losses[-5:].mean() < 0.5 * losses[:5].mean()
    mixed = patterns[[2, 0, 1, 1, 2]] + 0.3 * torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        weights = model.weigh(mixed)
        assert weights.argmax(-1).tolist() == [2, 0, 1, 1, 2]
        torch.testing.assert_close(weights.sum(-1), torch.ones(5))
        torch.testing.assert_close(model(mixed), model(mixed, weights=weights))
    again = fit_router(model, inputs, steps=60, lr=5e-3)
    assert torch.equal(losses, again)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_weights_of_one_task_and_full_rank_are_its_expert() -> None:
    """But for what no layer holds: here the class token and the positions, which all have from the shared model."""
    one, experts = case_of()
    with torch.no_grad():
        for expert in experts.values():
            expert.cls_token.copy_(one.model.cls_token)
            expert.pos_embed.copy_(one.model.pos_embed)
    model = twin_merging(one.model, experts, rank=None)
    assert model.unrouted == ()
    for t, expert in enumerate(experts.values()):
        weights = torch.eye(3)[t].expand(BATCH, 3)
        with torch.no_grad():
            torch.testing.assert_close(model(one.inputs, weights=weights), expert(one.inputs), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        none = model(one.inputs, weights=torch.zeros(BATCH, 3))
    states = [expert.state_dict() for expert in experts.values()]
    shared = deepcopy(one.model)
    shared.load_state_dict(merge_state_dicts(one.model.state_dict(), states, method="task_arithmetic", lam=LAM))
    torch.testing.assert_close(none, features(one, shared))


def test_another_shared_model() -> None:
    one, experts = case_of()
    state = experts["task1"].state_dict()
    model = twin_merging(one.model, experts, shared=state)
    with torch.no_grad():
        found = model(one.inputs, weights=torch.eye(3)[1].expand(BATCH, 3))
        torch.testing.assert_close(found, experts["task1"](one.inputs))


def test_identical_experts_share_their_weights() -> None:
    one, experts = case_of(num_experts=1)
    expert = experts["task0"]
    thrice = twin_merging(one.model, dict.fromkeys("abc", expert), lam=0.1, rank=4)
    once = twin_merging(one.model, {"a": expert}, lam=0.3, rank=4)
    with torch.no_grad():
        expected = once(one.inputs, weights=torch.ones(BATCH, 1))
        found = thrice(one.inputs, weights=torch.randn(BATCH, 3).softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_gradients_reach_the_weights() -> None:
    one, experts = case_of()
    model = twin_merging(one.model.double(), {task: expert.double() for task, expert in experts.items()}, rank=2)
    weights = torch.randn(2, 3, dtype=torch.float64).softmax(-1).requires_grad_()
    inputs = one.inputs[:2].double()
    assert torch.autograd.gradcheck(lambda w: model(inputs, weights=w), (weights,))


def test_what_torchs_attention_holds_is_shared() -> None:
    one, experts = case_of(open_clip)
    model = twin_merging(one.model, experts)
    assert {"transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.1.attn.out_proj.weight"} < set(
        model.unrouted
    )
    assert not any(".mlp." in name or ".ln_" in name for name in model.unrouted)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, e: twin_merging(m, e, rank=-1), ValueError, "rank must be 1 or greater, got -1"),
        (lambda m, e: twin_merging(m, e, shared={}), ValueError, r"experts\[0\] must have the names of base"),
        (lambda m, e: twin_merging(m, e)(torch.zeros(1, 3, 8, 8)), RuntimeError, "router must be fitted before inputs"),
        (
            lambda m, e: twin_merging(m, e)(torch.zeros(2, 3, 8, 8), weights=torch.ones(2, 2)),
            ValueError,
            r"weights must have shape \(2, 3\), got \(2, 2\)",
        ),
        (
            lambda m, e: fit_router(twin_merging(m, e), {"task0": torch.zeros(2, 3, 8, 8)}),
            ValueError,
            r"inputs must have samples for the tasks \['task0', 'task1', 'task2'\], got \['task0'\]",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    one, experts = case_of()
    with pytest.raises(error, match=message):
        call(one.model, experts)


def test_a_layer_that_sees_other_rows_than_samples_is_refused() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(-1, 1, 4)).reshape(x.shape)

    base = Windows()
    with torch.no_grad():
        expert = deepcopy(base)
        expert.layer.weight += 1
    model = twin_merging(base, {"a": expert, "b": base})
    with pytest.raises(ValueError, match="layers with experts must see 2 samples, as the model does, got 6: exclude"):
        model(torch.zeros(2, 3, 4), weights=torch.ones(2, 2))
