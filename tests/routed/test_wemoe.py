"""WEMoE against its formula, and FusionBench's."""

from __future__ import annotations

import importlib
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from surgery_kernels import merge_state_dicts
from surgery_kernels.reproduce.digits.vit import VisionTransformer
from surgery_kernels.routed import find_feed_forward, wemoe
from surgery_kernels.routed.layers import Route
from surgery_kernels.routed.wemoe import MergedLinear
from tests.encoders import BATCH, made, perturbed, timm
from tests.routed.test_models import apart, case_of, features

pytestmark = pytest.mark.any_isa

LAM = 0.3


class Formula(nn.Module):
    """A network merged for one sample after the other, in plain PyTorch."""

    def __init__(self, base: nn.Module, experts: list[nn.Module], router: nn.Module) -> None:
        super().__init__()
        self.base, self.experts, self.router = base, nn.ModuleList(experts), router

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for sample in x:
            weights = self.router(sample[None])[0]
            merged = {name: p.clone() for name, p in self.base.named_parameters()}
            for weight, expert in zip(weights, self.experts, strict=True):
                for name, p in self.base.named_parameters():
                    merged[name] = merged[name] + weight * (expert.get_parameter(name) - p)
            outputs.append(functional_call(self.base, merged, (sample[None],)))
        return torch.cat(outputs)


def with_networks(base: nn.Module, experts: dict[str, nn.Module], networks: list[nn.Module]) -> nn.Module:
    """Task arithmetic, and a timm model's networks replaced."""
    states = [expert.state_dict() for expert in experts.values()]
    model = deepcopy(base)
    model.load_state_dict(merge_state_dicts(base.state_dict(), states, method="task_arithmetic", lam=LAM))
    for block, network in zip(model.blocks, networks, strict=True):
        block.mlp = network
    return model


def in_float64() -> tuple[Any, dict[str, nn.Module], Any]:
    one, experts = case_of()
    one.model.double()
    experts = {task: expert.double() for task, expert in experts.items()}
    return one, experts, apart(one.model, experts)


def test_it_is_the_formula() -> None:
    one, experts, model = in_float64()
    networks: list[nn.Module] = []
    for block, router in enumerate(model.routers):
        mlps = [deepcopy(m.blocks[block].mlp) for m in (one.model, *experts.values())]
        networks.append(Formula(mlps[0], mlps[1:], router))
    expected = features(one, with_networks(one.model, experts, networks), one.inputs.double())
    torch.testing.assert_close(features(one, model, one.inputs.double()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_it_is_fusion_benchs(depth: int) -> None:
    """FusionBench 0.2.33 merges sample by sample, parameter by parameter. After training it turns its mean over the
    batch off in the wrong module, so that its trained models keep the mean."""
    theirs = pytest.importorskip("fusion_bench.models.we_moe", reason="fusion-bench is not installed")
    one, experts = case_of()
    model = wemoe(one.model, experts, lam=LAM, depth=depth)
    for parameter in (p for router in model.routers for p in router.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    networks: list[nn.Module] = []
    for block, router in enumerate(model.routers):
        mlps = [deepcopy(m.blocks[block].mlp) for m in (one.model, *experts.values())]
        network = theirs.WeightEnsemblingMoE(16, mlps[0], mlps[1:], LAM, batch_first=True, router_hidden_layers=depth)
        for own, their in zip(router.parameters(), network.gate.parameters(), strict=True):
            their.data.copy_(own)
        networks.append(network)
    expected = with_networks(one.model, experts, networks)
    torch.testing.assert_close(features(one, model), features(one, expected), rtol=1e-4, atol=1e-5)
    for network in networks:
        network.batch_reduce = depth > 0
    with model.one_merge_a_batch():
        torch.testing.assert_close(features(one, model), features(one, expected), rtol=1e-4, atol=1e-5)
    assert all(layer.per_sample for layer in model.modules() if isinstance(layer, MergedLinear))


def test_it_begins_near_task_arithmetic() -> None:
    one, experts = case_of()
    states = [expert.state_dict() for expert in experts.values()]
    merged = deepcopy(one.model)
    merged.load_state_dict(merge_state_dicts(one.model.state_dict(), states, method="task_arithmetic", lam=LAM))
    the_same = features(one, wemoe(one.model, experts, depth=0))
    torch.testing.assert_close(the_same, features(one, merged), rtol=1e-4, atol=1e-5)
    begun = features(one, wemoe(one.model, experts))
    assert (begun - features(one, merged)).norm() < 0.05 * begun.norm()
    assert torch.equal(begun, features(one, wemoe(one.model, experts)))
    assert not torch.equal(begun, features(one, wemoe(one.model, experts, seed=1)))


def test_one_expert_at_weight_one_is_it() -> None:
    one, experts = case_of(num_experts=1)
    expected = features(one, experts["task0"])
    alone = wemoe(one.model, experts, lam=1.0, depth=0)
    torch.testing.assert_close(features(one, alone), expected, rtol=1e-4, atol=1e-5)


def test_identical_experts_count_as_often_as_they_are() -> None:
    one, experts = case_of(num_experts=1)
    twice = wemoe(one.model, {"a": experts["task0"], "b": experts["task0"]}, lam=0.25, depth=0)
    once = wemoe(one.model, experts, lam=0.5, depth=0)
    torch.testing.assert_close(features(one, twice), features(one, once), rtol=1e-4, atol=1e-5)


def test_with_and_without_gradients_and_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, experts = case_of()
    model = apart(one.model, experts)
    without = model(one.inputs).detach()
    assert torch.equal(features(one, model), without)
    monkeypatch.setattr(importlib.import_module("surgery_kernels.routed.wemoe"), "AT_ONCE", 1000)
    torch.testing.assert_close(features(one, model), without, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_weights() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4).double() for _ in range(3)]
    merged = MergedLinear(layers[0], 2, None, Route(), token_major=False)
    parts = [[layer.weight.detach(), layer.bias.detach()] for layer in layers]
    merged.fill(parts[0], parts[1:])

    def call(x: Tensor, weights: Tensor) -> Tensor:
        merged.route.weights = weights
        return merged(x)

    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    for batch in (1, 5):
        weights = torch.randn(batch, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(call, (x, weights))


def test_only_routers_learn() -> None:
    one, experts, model = in_float64()
    model(one.inputs.double()).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".router." in name for name in with_gradient) and len(with_gradient) == 8


def test_networks_without_a_module_of_their_own() -> None:
    base = VisionTransformer(width=8, depth=2, num_heads=2, num_features=6).eval()
    assert [one.layers for one in find_feed_forward(base)] == [
        (f"blocks.{i}.expand", f"blocks.{i}.contract") for i in range(2)
    ]
    experts = {"a": perturbed(base, 1), "b": perturbed(base, 2)}
    images = torch.randn(BATCH, 8, 8)
    with torch.no_grad():
        given = wemoe(base, experts, networks=[["blocks.0.expand", "blocks.0.contract"]])(images)
        found = wemoe(base, experts)(images)
    assert given.shape == found.shape and not torch.equal(given, found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "depth must be 0, 1 or 2, got 3"),
        ({"lam": "x"}, "lam must be a number, got 'x'"),
        ({"networks": [["blocks.0"]]}, "networks must be names of linear layers of base, got 'blocks.0'"),
        ({"networks": [["blocks.0.mlp.fc1"] * 2]}, "networks must be different layers, got 'blocks.0.mlp.fc1' twice"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    one = made(timm)
    with pytest.raises((ValueError, TypeError), match=message):
        wemoe(one.model, {"a": one.model}, **options)
