"""Experts weights averaging against its formula, and in the training of a small vision transformer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from surgery_kernels.reproduce.jobs import one_thread
from surgery_kernels.routed import ExpertsAveraging, RandomExperts, collapse, upcycle
from tests.encoders import clip, made, own, timm

pytestmark = pytest.mark.any_isa


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6)).to(dtype)


def apart(num_experts: int, dtype: torch.dtype = torch.float64) -> RandomExperts:
    """Experts that differ by far."""
    experts = RandomExperts(network(dtype), num_experts)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def averaged(values: list[Tensor], share: float) -> list[Tensor]:
    """The formula, from the values before the step."""
    others = [sum(v for j, v in enumerate(values) if j != i) for i in range(len(values))]
    return [(1 - share) * v + share / (len(values) - 1) * o for v, o in zip(values, others, strict=True)]


def values_of(experts: RandomExperts) -> list[list[Tensor]]:
    """[parameter][expert]"""
    return [
        [p.detach().clone() for p in of_all] for of_all in zip(*(e.parameters() for e in experts.experts), strict=True)
    ]


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_experts", [2, 3, 8, 9])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_step_is_the_formula(num_experts: int, share: float) -> None:
    experts = apart(num_experts)
    before = values_of(experts)
    ExpertsAveraging(experts, share).step()
    for was, now in zip(before, values_of(experts), strict=True):
        for expected, got in zip(averaged(was, share), now, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    experts = apart(4, dtype)
    before = values_of(experts)
    ExpertsAveraging(experts, 0.25).step()
    for was, now in zip(before, values_of(experts), strict=True):
        for expected, got in zip(averaged([x.double() for x in was], 0.25), now, strict=True):
            slack = torch.finfo(dtype).eps if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
            assert ((got.double() - expected).abs() <= slack * expected.abs() + 1e-6).all()


def test_the_example_of_three() -> None:
    experts = RandomExperts(nn.Linear(1, 1, bias=False), 3)
    for expert, value in zip(experts.experts, (1.0, 2.0, 6.0), strict=True):
        nn.init.constant_(expert.weight, value)
    ExpertsAveraging(experts, 0.3).step()
    assert [round(e.weight.item(), 6) for e in experts.experts] == [1.9, 2.45, 4.65]


def test_what_steps_leave_alone_and_what_they_shrink() -> None:
    experts, share = apart(4), 0.2
    means = experts.mean()
    far = [torch.stack(of_all) - torch.stack(of_all).mean(0) for of_all in values_of(experts)]
    averaging = ExpertsAveraging(experts, share)
    for _ in range(3):
        averaging.step()
    for name, mean in experts.mean().items():
        torch.testing.assert_close(mean, means[name], rtol=0, atol=1e-14)
    for was, now in zip(far, values_of(experts), strict=True):
        near = torch.stack(now) - torch.stack(now).mean(0)
        torch.testing.assert_close(near, (1 - share * 4 / 3) ** 3 * was, rtol=0, atol=1e-13)
    ExpertsAveraging(experts, 3 / 4).step()  # the share at which all become the mean
    for of_all in values_of(experts):
        torch.testing.assert_close(torch.stack(of_all), of_all[0].expand(4, *of_all[0].shape), rtol=0, atol=1e-14)


def test_all_experts_of_all_layers_take_one_launch() -> None:
    model = nn.Sequential(apart(4), apart(4))
    with Calls() as calls:
        ExpertsAveraging(model, 0.1).step()
    assert [name for name in calls.names if "surgery_kernels" in name] == ["surgery_kernels.mix_out.default"]


def test_the_share_grows_over_the_ramp_and_goes_on_where_a_run_stopped() -> None:
    averaging = ExpertsAveraging(apart(2), 0.4, ramp=4)
    assert [averaging.share_of(k) for k in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert ExpertsAveraging(apart(2), lambda step: 0.1 * step).share_of(3) == pytest.approx(0.3)
    averaging.step()
    resumed = ExpertsAveraging(apart(2), 0.4, ramp=4)
    resumed.load_state_dict(averaging.state_dict())
    assert resumed.steps == 1


def test_the_optimizer_calls_it() -> None:
    experts = apart(3)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.0)
    handle = ExpertsAveraging(experts, 2 / 3).after(optimizer)
    before = values_of(experts)
    experts(torch.randn(9, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert not torch.equal(values_of(experts)[0][0], before[0][0])
    handle.remove()
    kept = values_of(experts)
    optimizer.step()
    for was, now in zip(kept, values_of(experts), strict=True):
        assert torch.equal(torch.stack(was), torch.stack(now))


def test_a_graph_notices_that_parameters_moved() -> None:
    experts = apart(2)
    loss = experts(torch.randn(4, 6, dtype=torch.float64, requires_grad=True)).sum()
    ExpertsAveraging(experts, 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 12])
def test_every_token_goes_to_one_expert_and_back_to_its_place(num_tokens: int) -> None:
    class Marks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            counts.append(len(x))
            return x + 100 * len(counts)

    counts: list[int] = []
    experts = RandomExperts(Marks(), 3).train()
    tokens = torch.arange(float(num_tokens))[:, None]
    out = experts(tokens)
    assert sum(counts) == num_tokens and max(counts) - min(counts) <= 1
    assert torch.equal(out % 100, tokens)
    assert sorted(torch.bincount((out // 100).long().flatten(), minlength=4)[1:].tolist()) == sorted(counts)


def test_layout_and_gradients() -> None:
    experts = apart(2).train()
    for expert in experts.experts[1:]:
        expert.load_state_dict(experts.experts[0].state_dict())
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    alike, one = experts(x), experts.experts[0](x)
    torch.testing.assert_close(alike, one)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (alike, one))
    torch.testing.assert_close(ours, theirs)


def test_evaluation_is_the_collapsed_model() -> None:
    model = nn.Sequential(nn.Linear(6, 6), apart(3, torch.float32)).eval()
    x = torch.randn(4, 6)
    before = model(x)
    dense = collapse(model)
    assert dense is model and type(dense[1]) is nn.Sequential
    torch.testing.assert_close(dense(x), before)
    assert type(collapse(apart(2))) is nn.Sequential


@pytest.mark.parametrize(("case", "name"), [(timm, "blocks.1.mlp"), (clip, "vision_model.encoder.layers.1.mlp")])
def test_networks_are_found(case: Any, name: str) -> None:
    one = made(case)
    state = one.model.state_dict()
    model = deepcopy(one.model)
    assert upcycle(model, 2) == (name,)
    torch.testing.assert_close(one.representation(model(one.inputs)), one.representation(one.model(one.inputs)))
    assert {key: x.shape for key, x in collapse(model).state_dict().items()} == {k: x.shape for k, x in state.items()}


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    inner = network(torch.float32)
    model = nn.ModuleDict({"a": inner, "b": inner})
    upcycle(model, 2, ["a"])
    assert model["a"] is model["b"] and isinstance(model["b"], RandomExperts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomExperts(nn.Linear(2, 2), 1), "num_experts must be 2 or greater, got 1"),
        (lambda: ExpertsAveraging(nn.Linear(2, 2), 0.1), "model must have RandomExperts, got none: upcycle it first"),
        (lambda: ExpertsAveraging(apart(2), 1.5), r"share must be in \[0, 1\], got 1.5"),
        (lambda: ExpertsAveraging(apart(2), lambda k: -1).step(), r"share must be in \[0, 1\], got -1.0"),
        (lambda: ExpertsAveraging(apart(2), 0.1, ramp=-1), "ramp must be 0 or greater, got -1"),
        (lambda: ExpertsAveraging(apart(2), abs, ramp=2), "ramp must be 0 where share is a function"),
        (lambda: upcycle(nn.Linear(2, 2), 2, ["x"]), "networks must be names of modules inside the model, got 'x'"),
        (lambda: upcycle(own().model, 2), "must have one linear layer that narrows what others widened, got none"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@one_thread()
def test_a_vision_transformer_is_trained_with_it() -> None:
    """Digits: what is left after the collapse has one network a block, and has learned."""
    from sklearn.datasets import load_digits
    from timm.models import VisionTransformer

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(digits.target)
    model = VisionTransformer(8, 2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2)
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    assert upcycle(model, 4) == ("blocks.1.mlp",)
    steps = 300
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ExpertsAveraging(model, 0.3, ramp=steps).after(optimizer)
    train = (torch.arange(len(labels)) % 4 > 0).nonzero().flatten()
    for _ in range(steps):
        rows = train[torch.randint(len(train), (64,))]
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dense = collapse(model.eval())
    assert {name: x.shape for name, x in dense.state_dict().items()} == shapes
    with torch.no_grad():
        right = dense(images[::4]).argmax(-1) == labels[::4]
    assert right.float().mean() > 0.8
