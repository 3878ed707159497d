"""Which unit goes with which: by weights and by activations."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.matching import Matching, find_symmetries, match_activations, match_weights
from surgery_kernels.matching.assignment import assigned
from tests.matching.models import SMALL, ResNet, images, made, mlp, shuffled, vit_of_digits

pytestmark = pytest.mark.any_isa


def matched(how: str, kind: Callable[[], nn.Module], first: nn.Module, second: nn.Module, **options: Any) -> Matching:
    symmetries = find_symmetries(first, images(kind, 2))
    if how == "weights":
        return match_weights(symmetries, first, second, **options)
    return match_activations(symmetries, first, second, images(kind), **options)


@pytest.mark.parametrize("how", ["weights", "activations"])
@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_a_shuffled_model_is_put_in_order(kind: Callable[[], nn.Module], how: str) -> None:
    model = made(kind, 0)
    symmetries = find_symmetries(model, images(kind, 2))
    other, orders = shuffled(model, symmetries)
    found = matched(how, kind, model, other)
    back = symmetries.permuted(other.state_dict(), found.permutations)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: order.argsort().tolist() for name, order in orders.items() if order.dim() == 1} == {
        name: order.tolist() for name, order in found.permutations.items() if order.dim() == 1
    }
    assert max(float(distance.max()) for distance in found.distance.values()) < 1e-6


@pytest.mark.parametrize("similarity", ["distance", "inner"])
def test_activations_are_those_of_the_formula(similarity: str) -> None:
    first, second = made(mlp, 0), made(mlp, 1)
    found = matched("activations", mlp, first, second, similarity=similarity, batch_size=7)
    x = [model[:3](images(mlp)).detach().double() for model in (first, second)]  # type: ignore[index]
    scores = -torch.cdist(x[0].T, x[1].T) if similarity == "distance" else x[0].T @ x[1]
    order = assigned(scores)
    assert torch.equal(found.permutations["1.weight[0]"], order)
    pairs = scores.gather(1, order[:, None])[:, 0]
    torch.testing.assert_close(found.similarity["1.weight[0]"], pairs, rtol=1e-5, atol=1e-5)
    y = x[1][:, order]
    distance = (x[0] - y).square().sum(0) / (x[0].square().sum(0) + y.square().sum(0))
    torch.testing.assert_close(found.distance["1.weight[0]"], distance, rtol=1e-5, atol=1e-6)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def agreement(first: nn.Module, state: dict[str, Tensor]) -> float:
    return sum(float((x.double() * state[name].double()).sum()) for name, x in first.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_weights_end_where_no_group_gains(seed: int) -> None:
    """Against all permutations of each group, and never below where the models start."""
    first, second = made(two_layers, 2 * seed), made(two_layers, 2 * seed + 1)
    symmetries = find_symmetries(first, torch.randn(2, 3))
    found = match_weights(symmetries, first, second, seed=seed)
    state = second.state_dict()
    reached = agreement(first, symmetries.permuted(state, found.permutations))
    for group in symmetries.groups:
        for order in itertools.permutations(range(group.size)):
            one = {**found.permutations, group.name: torch.tensor(order)}
            assert agreement(first, symmetries.permuted(state, one)) <= reached + 1e-9
    assert reached >= agreement(first, state)
    all_orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    names = [group.name for group in symmetries.groups]
    every = [
        agreement(first, symmetries.permuted(state, dict(zip(names, pair, strict=True))))
        for pair in itertools.product(all_orders, repeat=2)
    ]
    assert reached >= 0.9 * max(every)
    assert match_weights(symmetries, first, second, seed=seed).permutations.keys() == found.permutations.keys()


def test_a_stream_that_meets_itself_gains_too() -> None:
    """Square layers in one stream: both sides of a product move at once."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(3, 6), nn.Linear(6, 2)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return self.leave(x)

    first, second = made(Stream, 0), made(Stream, 1)
    symmetries = find_symmetries(first, torch.randn(2, 3))
    started = match_weights(symmetries, first, second, max_sweeps=0)
    found = match_weights(symmetries, first, second)
    values = [agreement(first, symmetries.permuted(second.state_dict(), m.permutations)) for m in (started, found)]
    assert values[1] >= values[0] > agreement(first, second.state_dict())


def test_features_of_heads_are_matched_head_by_head() -> None:
    """The best pairs of heads and of features in them, against all pairs of heads."""
    first, second = made(vit_of_digits, 0), made(vit_of_digits, 1)
    symmetries = find_symmetries(first, images(vit_of_digits, 2))
    found = match_activations(symmetries, first, second, images(vit_of_digits), similarity="inner")
    heads, features = "blocks.0.qkv.weight[0][1]", "blocks.0.qkv.weight[0][2]"
    seen: list[Tensor] = []
    for model in (first, second):
        handle = model.blocks[0].out.register_forward_hook(lambda _, args, __: seen.append(args[0]))  # type: ignore
        model(images(vit_of_digits))
        handle.remove()
    x, y = (rows.detach().double().flatten(0, 1).unflatten(-1, (4, 4)) for rows in seen)
    products = torch.einsum("rhd,rge->hgde", x, y)
    best = torch.stack([torch.stack([p.gather(1, assigned(p)[:, None]).sum() for p in row]) for row in products])
    order = max(itertools.permutations(range(4)), key=lambda order: float(best[range(4), order].sum()))
    assert found.permutations[heads].tolist() == list(order)
    for head, other in enumerate(order):
        assert torch.equal(found.permutations[features][head], assigned(products[head, other]))
    torch.testing.assert_close(found.similarity[heads], best[range(4), order], rtol=1e-4, atol=1e-3)


def test_models_that_do_not_fit_are_refused() -> None:
    first = made(mlp, 0)
    symmetries = find_symmetries(first, images(mlp, 2))
    with pytest.raises(ValueError, match=r"^second must be like first in 'stem.weight'|outside of heads, got no"):
        match_weights(symmetries, first, made(ResNet, 0))
    wide = {name: x.repeat(2) if name == "1.bias" else x for name, x in first.state_dict().items()}
    with pytest.raises(ValueError, match=r"^second must be like first in '1.bias', torch.float32 \(16,\) on cpu, got "):
        match_weights(symmetries, first, wide)
    state = {name: torch.full_like(x, torch.nan) for name, x in first.state_dict().items()}
    with pytest.raises(ValueError, match="^models must be finite where their units are matched, got NaN or infinity$"):
        match_weights(symmetries, first, state)
    with pytest.raises(ValueError, match="^similarity must be one of 'distance', 'inner', got 'cosine'$"):
        match_activations(symmetries, first, first, images(mlp), similarity="cosine")
    with pytest.raises(ValueError, match="^max_sweeps must be 0 or greater, got -1$"):
        match_weights(symmetries, first, first, max_sweeps=-1)


def test_activations_need_a_layer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.into).relu() @ self.out

    model = Scaled()
    symmetries = find_symmetries(model, torch.randn(2, 6))
    assert [(m.tensor, m.dim, m.is_read) for m in symmetries.groups[0].members] == [
        ("into", 1, False), ("out", 0, True)
    ]  # fmt: skip
    other, orders = shuffled(model, symmetries)
    found = match_weights(symmetries, model, other)
    assert torch.equal(found.permutations["into[1]"], orders["into[1]"].argsort())
    message = (
        r"^model must have a linear layer or a convolution at the units of 'into\[1\]' for matching by activations"
    )
    with pytest.raises(ValueError, match=message):
        match_activations(symmetries, model, other, torch.randn(4, 6))


def test_scipy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"^scipy must be installed for matching, got: .*surgery-kernels\[matching\]"):
        assigned(torch.eye(2))
