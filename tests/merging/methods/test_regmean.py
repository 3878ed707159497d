"""RegMean against the least-squares solution, and the Gram matrices of a model's layers."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import gram_matrices
from tests.cases import DTYPES, assert_same, generator, option_id

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
ROWS = 40


def inputs(t: int, rows: int = ROWS) -> Tensor:
    """Rows of 6 inputs with correlations of their own for every task."""
    g = generator("inputs", t)
    return torch.randn(rows, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64)


def models(dtype: torch.dtype = torch.float64, num_tasks: int = 3) -> tuple[StateDict, list[StateDict]]:
    def state(*seed: Any) -> StateDict:
        g = generator("state", seed)
        shapes = {"layer.weight": (4, 6), "layer.bias": (4,)}
        return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}

    return state("base"), [state("expert", t) for t in range(num_tasks)]


def grams(num_tasks: int = 3, rows: int = ROWS) -> list[StateDict]:
    return [{"layer.weight": inputs(t, rows).T @ inputs(t, rows) / rows} for t in range(num_tasks)]


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_least_squares(dtype: torch.dtype) -> None:
    """One layer for all tasks that predicts what the experts' layers predict."""
    base, experts = models(dtype)
    merged = merge_state_dicts(base, experts, method="regmean", grams=grams(), off_diagonal=1.0)
    x = torch.cat([inputs(t) for t in range(3)])
    y = torch.cat([inputs(t) @ expert["layer.weight"].double().T for t, expert in enumerate(experts)])
    expected = torch.linalg.lstsq(x, y).solution.T
    tolerance = 1e-9 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(merged["layer.weight"].double(), expected, rtol=tolerance, atol=tolerance)
    average = merge_state_dicts(base, experts, method="average")
    torch.testing.assert_close(merged["layer.bias"], average["layer.bias"])


@pytest.mark.parametrize("off_diagonal", [0.0, 0.1, 0.9])
def test_formula(off_diagonal: float) -> None:
    base, experts = models()
    merged = merge_state_dicts(base, experts, method="regmean", grams=grams(), off_diagonal=off_diagonal)
    scaled = [g["layer.weight"] * (off_diagonal + (1 - off_diagonal) * torch.eye(6).double()) for g in grams()]
    weighted = sum(g @ expert["layer.weight"].T for g, expert in zip(scaled, experts, strict=True))
    torch.testing.assert_close(merged["layer.weight"], (torch.linalg.inv(sum(scaled)) @ weighted).T)


def test_the_default_is_the_papers() -> None:
    base, experts = models()
    merged = merge_state_dicts(base, experts, method="regmean", grams=grams())
    assert_same(
        merged["layer.weight"],
        merge_state_dicts(base, experts, method="regmean", grams=grams(), off_diagonal=0.9)["layer.weight"],
    )


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_where_inputs_say_nothing_it_averages(off_diagonal: float) -> None:
    base, experts = models()
    average = merge_state_dicts(base, experts, method="average")["layer.weight"]
    known = grams()
    for gram in known:
        gram["layer.weight"][2] = 0
        gram["layer.weight"][:, 2] = 0
    merged = merge_state_dicts(base, experts, method="regmean", grams=known, off_diagonal=off_diagonal)
    torch.testing.assert_close(merged["layer.weight"][:, 2], average[:, 2])
    assert not torch.isclose(merged["layer.weight"], average)[:, [0, 1, 3, 4, 5]].all()
    nothing = [{"layer.weight": torch.zeros(6, 6)}] * 3
    merged = merge_state_dicts(base, experts, method="regmean", grams=nothing, off_diagonal=off_diagonal)
    torch.testing.assert_close(merged["layer.weight"], average)


def test_fewer_rows_than_inputs() -> None:
    base, experts = models(num_tasks=2)
    merged = merge_state_dicts(base, experts, method="regmean", grams=grams(2, rows=2), off_diagonal=1.0)
    for t, expert in enumerate(experts):
        predicted, wanted = (inputs(t, 2) @ w["layer.weight"].T for w in (merged, expert))
        torch.testing.assert_close(predicted, wanted)


def test_one_expert_stays_itself() -> None:
    base, experts = models(num_tasks=1)
    merged = merge_state_dicts(base, experts, method="regmean", grams=grams(1))
    torch.testing.assert_close(merged["layer.weight"], experts[0]["layer.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grams": []}, "grams must be one mapping per expert (3), got 0"),
        ({"off_diagonal": 1.5}, "off_diagonal must be in [0, 1], got 1.5"),
        ({"off_diagonal": math.nan}, "off_diagonal must be in [0, 1], got nan"),
        (
            {"grams": [{"layer.weight": torch.eye(4)}] * 3},
            "grams[0]['layer.weight'] must be a tensor of shape (6, 6), got (4, 4)",
        ),
        ({"grams": [{"layer.bias": torch.eye(4)}] * 3}, "grams must be for matrices, got 'layer.bias' of shape (4,)"),
        (
            {"grams": [{"layer": torch.eye(6)}] * 3},
            "grams must have names of floating-point tensors of base, got 'layer'",
        ),
        (
            {"grams": [{"layer.weight": torch.full((6, 6), math.nan)}] * 3},
            "grams[0]['layer.weight'] must be finite, got NaN or infinity",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(options: dict[str, Any], message: str) -> None:
    base, experts = models()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, method="regmean", **{"grams": grams(), **options})


class Network(nn.Module):
    """A layer on tokens, one called twice, and an attention whose projections are used without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.again = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.again(self.again(tokens))


def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().double().eval()


def test_gram_matrices() -> None:
    model, x = network(), inputs(0, 24).view(4, 6, 6)
    known = gram_matrices(model, x.split(3))
    assert sorted(known) == ["again.weight", "embed.weight"]
    flat = x.flatten(end_dim=-2)
    torch.testing.assert_close(known["embed.weight"], flat.T @ flat / len(flat))
    with torch.no_grad():
        tokens = model.embed(x)
        first = tokens + model.attention(tokens, tokens, tokens)[0]
        both = torch.cat([first, model.again(first)]).flatten(end_dim=-2)
    torch.testing.assert_close(known["again.weight"], both.T @ both / len(both))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert gram_matrices(model.bfloat16(), [(x.bfloat16(),)])["embed.weight"].dtype == torch.float32


def test_every_form_of_batches() -> None:
    model, x = network(), inputs(0, 24).view(4, 6, 6)
    expected = gram_matrices(model, [x])
    for batch in ((x,), [x], (x, torch.zeros(4)), {"x": x}, {"x": x, "labels": torch.zeros(4)}):
        assert torch.equal(gram_matrices(model, [batch])["embed.weight"], expected["embed.weight"])


class Named(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def test_a_layer_that_is_called_by_keyword() -> None:
    x = inputs(0, 24)
    torch.testing.assert_close(gram_matrices(Named().double().eval(), [x])["layer.weight"], x.T @ x / len(x))


def test_layers_that_share_a_weight_have_one_matrix() -> None:
    model = network()
    model.embed = nn.Linear(8, 8).double()
    model.embed.weight = model.again.weight
    x = torch.cat([inputs(0, 24), inputs(1, 24)[:, :2]], dim=1).view(4, 6, 8)
    known = gram_matrices(model, [x])
    assert list(known) == ["embed.weight"]
    with torch.no_grad():
        tokens = model.embed(x)
        first = tokens + model.attention(tokens, tokens, tokens)[0]
        rows = torch.cat([x, first, model.again(first)]).flatten(end_dim=-2)
    torch.testing.assert_close(known["embed.weight"], rows.T @ rows / len(rows))


def test_gram_matrices_refused() -> None:
    with pytest.raises(ValueError, match="^model must be in evaluation mode, got training mode$"):
        gram_matrices(network().train(), [inputs(0)])
    with pytest.raises(ValueError, match="^batches must reach at least one nn.Linear, got none$"):
        gram_matrices(network(), [])


def test_a_model_is_merged_with_its_own_grams() -> None:
    base, experts = network(), [network(), network()]
    for t, expert in enumerate(experts):
        with torch.no_grad():
            for p in expert.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator(t, p.shape), dtype=p.dtype)
    known = [gram_matrices(expert, [inputs(t).view(4, 10, 6)]) for t, expert in enumerate(experts)]
    states = [expert.state_dict() for expert in experts]
    base.load_state_dict(merge_state_dicts(base.state_dict(), states, method="regmean", grams=known))

    def error(weight: Tensor) -> float:
        pairs = zip(experts, range(2), strict=True)
        return sum((inputs(t) @ (weight - expert.embed.weight).T).square().sum().item() for expert, t in pairs)

    assert error(base.embed.weight) < error((experts[0].embed.weight + experts[1].embed.weight) / 2)
