"""SMILE against its formula, and FusionBench's."""

from __future__ import annotations

from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.routed import smile
from surgery_kernels.routed.smile import SmileLinear
from tests.encoders import clip, made, perturbed, timm
from tests.routed.test_models import case_of, features

pytestmark = pytest.mark.any_isa

WIDTH, OUT, NUM_TASKS = 9, 7, 4


class One(nn.Module):
    """A single linear layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layers(bias: bool = True, scale: float = 0.5, num_tasks: int = NUM_TASKS) -> tuple[One, dict[str, nn.Module]]:
    torch.manual_seed(0)
    base = One(bias).double()
    return base, {f"task{t}": perturbed(base, t, scale) for t in range(num_tasks)}


def formula(
    base: One, experts: dict[str, nn.Module], x: Tensor, rank: int, gate_rank: int, top_k: int, gate_of: str = "change"
) -> Tensor:
    """One row after the other, by torch's decomposition."""
    of_base, of_experts = base.layer, [expert.layer for expert in experts.values()]
    rows = []
    for row in x.reshape(-1, WIDTH):
        scores = []
        for layer in of_experts:
            change = layer.weight - of_base.weight if gate_of == "change" else layer.weight
            scores.append((torch.linalg.svd(change).Vh[:gate_rank] @ row).norm())
        weights = torch.stack(scores).softmax(0)
        best = weights.argsort(descending=True)[:top_k]
        y = of_base(row)
        for t in best:
            u, s, vh = torch.linalg.svd(of_experts[t].weight - of_base.weight, full_matrices=False)
            added = (u[:, :rank] * s[:rank]) @ vh[:rank] @ row
            if of_base.bias is not None:
                added = added + of_experts[t].bias - of_base.bias
            y = y + weights[t] / weights[best].sum() * added
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], OUT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "gate_rank", "top_k"), [(3, 1, 1), (2, 3, 1), (7, 2, 1), (3, 2, 2), (3, 2, 4)])
def test_it_is_the_formula(bias: bool, rank: int, gate_rank: int, top_k: int) -> None:
    base, experts = layers(bias)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    for gate_of in ("change", "weight"):
        model = smile(base, experts, rank=rank, gate_rank=gate_rank, top_k=top_k, gate_of=gate_of)
        expected = formula(base, experts, x, rank, gate_rank, top_k, gate_of)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def smile_of_fusion_bench() -> ModuleType:
    name = "fusion_bench.models.smile_moe.linear_from_module"
    return pytest.importorskip(name, reason="fusion-bench is not installed")


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("case", [timm, clip])
def test_it_is_fusion_benchs(case: Any, top_k: int) -> None:
    """Of FusionBench 0.2.33, with its options; the tensors of no linear layer are the pretrained model's in both."""
    smile_of_fusion_bench()
    from fusion_bench.method import SmileUpscalingAlgorithm
    from fusion_bench.modelpool import BaseModelPool

    one, experts = case_of(case)
    pool = BaseModelPool(deepcopy({"_pretrained_": one.model, **experts}))
    theirs = SmileUpscalingAlgorithm(device="cpu", gate_k=2, k=4, top_k=top_k).run(pool)
    ours = smile(one.model, experts, rank=4, gate_rank=2, top_k=top_k)
    torch.testing.assert_close(features(one, ours), features(one, theirs), rtol=1e-3, atol=1e-4)


def test_what_fusion_bench_loses() -> None:
    """Where experts have another bias alone it takes them for untrained, and where one of them changed nothing, that
    one's gate measures along directions of its own, which a zero matrix does not have."""
    theirs = smile_of_fusion_bench()
    base, experts = layers(scale=0.0)
    with torch.no_grad():
        experts["task1"].layer.bias += 1
    options = {"gate_k": 1, "k": 2}
    with pytest.raises(theirs.ExpertNotTrainedError):
        theirs.SmileMoELinear(deepcopy(base.layer), [deepcopy(e.layer) for e in experts.values()], **options)
    alone = smile(base, {"task1": experts["task1"]}, rank=2)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(alone(x), base(x) + 1)

    base, experts = layers()
    experts["task0"] = deepcopy(base)
    x = torch.zeros(1, WIDTH, dtype=torch.float64)
    x[0, 0] = 100.0
    others = [deepcopy(experts[task].layer) for task in ("task0", "task1")]
    gate = theirs.SmileMoELinear(deepcopy(base.layer), others, **options).gate
    assert gate(x)[0, 0] == 100  # the length along the first axis
    ours = smile(base, {task: experts[task] for task in ("task0", "task1")}, rank=2).model.layer
    assert isinstance(ours, SmileLinear) and not ours.gate[0].any()
    torch.testing.assert_close(ours(x), formula(base, {"task1": experts["task1"]}, x, 2, 1, 1))


def test_one_expert_at_full_rank_is_it() -> None:
    base, experts = layers(num_tasks=1)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(smile(base, experts, rank=None)(x), experts["task0"](x))
    whole, of_it = case_of(num_experts=1)
    states = whole.model.state_dict() | {
        name: value for name, value in of_it["task0"].state_dict().items() if ".attn." in name or ".mlp." in name
    }
    expected = deepcopy(whole.model)
    expected.load_state_dict(states)
    ours = smile(whole.model, of_it, rank=1.0)
    torch.testing.assert_close(features(whole, ours), features(whole, expected), rtol=1e-4, atol=1e-4)


def test_identical_experts_are_one() -> None:
    base, experts = layers(num_tasks=1)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    expected = smile(base, experts, rank=3)(x)
    for top_k in (1, 2, 3):
        thrice = smile(base, dict.fromkeys("abc", experts["task0"]), rank=3, top_k=top_k)
        torch.testing.assert_close(thrice(x), expected)


def test_changes_of_low_rank_and_few_rows() -> None:
    base, experts = layers(num_tasks=2)
    direction = torch.outer(torch.randn(OUT), torch.randn(WIDTH)).double()
    with torch.no_grad():
        experts["task0"].layer.weight.copy_(base.layer.weight + direction)
    layer = smile(base, experts, rank=5).model.layer
    assert layer.down[0, 0].any() and not layer.down[0, 1:].any()
    torch.testing.assert_close(layer.up[0] @ layer.down[0], direction)
    assert layer(torch.zeros(0, WIDTH, dtype=torch.float64)).shape == (0, OUT)
    assert layer(torch.zeros(WIDTH, dtype=torch.float64)[None]).shape == (1, OUT)


def test_what_is_no_linear_layer_is_the_bases_or_the_average() -> None:
    one, experts = case_of()
    of_base = smile(one.model, experts).model.state_dict()
    averaged = smile(one.model, experts, rest="average").model.state_dict()
    mean = torch.stack([expert.state_dict()["pos_embed"] for expert in experts.values()]).mean(0)
    assert torch.equal(of_base["pos_embed"], one.model.pos_embed)
    torch.testing.assert_close(averaged["pos_embed"], mean)
    shared = "blocks.0.mlp.fc1.shared.weight"
    assert torch.equal(averaged[shared], of_base[shared])
    assert torch.equal(averaged["blocks.0.mlp.fc1.shift"], of_base["blocks.0.mlp.fc1.shift"])


def test_excluded_layers_are_said() -> None:
    one, experts = case_of()
    model = smile(one.model, experts, exclude=("blocks.0.*", "*attn*"))
    routed = [name for name, module in model.model.named_modules() if isinstance(module, SmileLinear)]
    assert routed == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert "blocks.0.mlp.fc1.weight" in model.unrouted and "blocks.1.mlp.fc1.weight" not in model.unrouted
    assert "pos_embed" in model.unrouted


def test_a_layer_under_two_names_is_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    base = Tied()
    expert = perturbed(base, 1)
    model = smile(base, {"a": expert}, rank=None)
    assert model.unrouted == () and model.model.first is model.model.second
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), expert(x))


def test_gradients_reach_the_input_and_factors_that_are_freed() -> None:
    base, experts = layers()
    for top_k in (1, 2):
        layer = smile(base, experts, rank=2, top_k=top_k).model.layer
        x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))
        layer.up.requires_grad_()
        layer(x).sum().backward()
        assert layer.up.grad is not None and layer.down.grad is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be 1 or greater, got 0"),
        ({"rank": 1.5}, ValueError, r"rank must be an integer, or a share in \(0, 1\], got 1.5"),
        ({"gate_rank": None}, TypeError, "gate_rank must be a number or a share, got None"),
        ({"top_k": 2}, ValueError, "top_k must be at most the number of experts, 1, got 2"),
        ({"gate_of": "x"}, ValueError, "gate_of must be one of 'change', 'weight', got 'x'"),
        ({"rest": "x"}, ValueError, "rest must be one of 'base', 'average', got 'x'"),
        ({"exclude": "x"}, TypeError, "exclude must be a sequence of patterns, got 'x'"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    one = made(timm)
    with pytest.raises(error, match=message):
        smile(one.model, {"a": one.model}, **options)
