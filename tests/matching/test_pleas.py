"""One model of two: what stays apart, what its layers are, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.matching import Matching, Merged, find_symmetries, match_activations, match_weights, pleas
from surgery_kernels.matching import least_squares as solving
from tests.matching.models import (
    SMALL,
    ResNet,
    images,
    made,
    mlp,
    resnet_of_torchvision,
    shuffled,
    vit_of_digits,
    vit_of_torchvision,
    with_depthwise,
    with_flattened_channels,
    with_normed_weight,
)

pytestmark = pytest.mark.any_isa


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def error(model: nn.Module, expected: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("match", "ratio"), [("weights", 0.0), ("activations", 0.4)])
@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_a_model_and_itself_are_that_model(kind: Callable[[], nn.Module], match: str, ratio: float) -> None:
    first, x = made(kind, 0), images(kind)
    second, _ = shuffled(first, find_symmetries(first, x))
    merged = pleas(first, second, x, match=match, ratio=ratio, reset_statistics=False)
    assert error(merged.model, first(x).detach(), x) < 1e-5
    assert (size(merged.model) > size(first)) is (ratio > 0)
    if ratio == 0:
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            for a, b in zip(merged.model.state_dict().values(), first.state_dict().values(), strict=True)
        )


def test_resnet_of_torchvision() -> None:
    first, x = made(resnet_of_torchvision, 0), images(resnet_of_torchvision, 4)
    second, _ = shuffled(first, find_symmetries(first, x))
    options: dict[str, Any] = {"match": "weights", "least_squares": False, "reset_statistics": False}
    merged = pleas(first, second, x, ratio=0.2, **options)
    assert error(merged.model, first(x).detach(), x) < 1e-5
    assert merged.model.layer1[0].conv1.out_channels == merged.model.layer1[0].bn1.num_features == 77


@pytest.mark.parametrize(
    "kind", [ResNet, mlp, with_flattened_channels, with_depthwise, with_normed_weight], ids=lambda kind: kind.__name__
)
def test_all_apart_is_the_mean_of_both(kind: Callable[[], nn.Module]) -> None:
    first, second, x = made(kind, 0), made(kind, 1), images(kind)
    merged = pleas(first, second, x, ratio=1.0, reset_statistics=False)
    assert error(merged.model, ((first(x) + second(x)) / 2).detach(), x) < 1e-5
    assert all(width == 2 * group.size for group, width in zip(groups(first, x), merged.widths.values(), strict=True))


def groups(model: nn.Module, x: Tensor) -> Any:
    return find_symmetries(model, x).groups


def by_formula(first: nn.Module, second: nn.Module, x: Tensor, matching: Matching, ratio: float) -> list[Tensor]:
    """[weight, bias] of the three layers of `mlp`: each least squares problem written out, rows of ones for biases."""
    p = dict(zip("ab", matching.permutations.values(), strict=True))
    c = dict(zip("ab", matching.similarity.values(), strict=True))
    both = {g: c[g] >= c[g].quantile(ratio) for g in "ab"}
    places = {g: (both[g].nonzero()[:, 0], (~both[g]).nonzero()[:, 0]) for g in "ab"}

    def split(h1: Tensor, h2: Tensor, g: str | None) -> list[Tensor]:
        """What is both models', the first's, the second's."""
        if g is None:
            return [(h1 + h2) / 2, h1[:, :0], h2[:, :0]]
        together, apart = places[g]
        return [(h1[:, together] + h2[:, p[g][together]]) / 2, h1[:, apart], h2[:, p[g][apart]]]

    h1 = h2 = x.flatten(1).double()
    solved = []
    for layer, before, after in ((1, None, "a"), (3, "a", "b"), (5, "b", None)):
        w1, w2 = (model[layer].double() for model in (first, second))
        y1, y2 = w1(h1), w2(h2)
        xs, ys = split(h1, h2, before), split(y1, y2, after)
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        widths = [part.shape[1] for part in xs]
        rows = []
        for y, reads in zip(ys, ((0, 1, 2), (0, 1), (0, 2)), strict=True):
            found = torch.linalg.lstsq(torch.cat([*(xs[i] for i in reads), ones], 1), y).solution.T
            full = [torch.zeros(y.shape[1], width, dtype=torch.float64) for width in widths]
            for i, part in zip(reads, found[:, :-1].split([widths[i] for i in reads], 1), strict=True):
                full[i] = part
            rows.append(torch.cat([*full, found[:, -1:]], 1))
        matrix = torch.cat(rows)
        solved += [matrix[:, :-1], matrix[:, -1]]
        h1, h2 = y1.relu(), y2.relu()
    return [part.detach() for part in solved]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8])
def test_layers_are_the_solutions(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "RIDGE", 1e-13)
    first, second, x = made(mlp, 0).double(), made(mlp, 1).double(), images(mlp, 300).double()
    merged = pleas(first, second, x, ratio=ratio, batch_size=90)
    expected = by_formula(copy.deepcopy(first), copy.deepcopy(second), x, merged.matching, ratio)
    assert merged.solved == ("1", "3", "5")
    for found, wanted in zip(merged.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [ResNet, vit_of_digits, vit_of_torchvision], ids=lambda kind: kind.__name__)
def test_layer_after_layer_is_nearer_to_both(kind: Callable[[], nn.Module]) -> None:
    first, second, x = made(kind, 0), made(kind, 1), images(kind, 200)
    mean = ((first(x) + second(x)) / 2).detach()
    whole, layered = (pleas(first, second, x, order=order) for order in ("model", "layer"))
    assert set(layered.solved) == set(whole.solved)
    assert error(layered.model, mean, x) < 0.8 * error(whole.model, mean, x)


def test_a_layer_reads_what_the_merged_model_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each solution of "layer" once more, from the inputs that the merged model has at last."""
    monkeypatch.setattr(solving, "RIDGE", 1e-13)
    first, second, x = made(mlp, 0).double(), made(mlp, 1).double(), images(mlp, 300).double()
    merged = pleas(first, second, x, order="layer")
    p, q = merged.matching.permutations.values()
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    for end, order in ((1, p), (3, q), (5, torch.arange(5))):
        inputs = merged.model[:end](x)  # type: ignore[index]
        answers = (first[: end + 1](x) + second[: end + 1](x)[:, order]) / 2  # type: ignore[index]
        found = torch.linalg.lstsq(torch.cat([inputs, ones], 1), answers, driver="gelsd").solution.T
        layer = merged.model[end]  # type: ignore[index]
        # by what they answer: of units that are always 0 nothing follows
        expected = inputs @ found[:, :-1].T + found[:, -1]
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-6)


def test_one_number() -> None:
    """Inputs (1, 3) and (1, 1) of a layer that is 2 in one model and 4 in the other: 2.6, where the mean is 3."""

    class Line(nn.Module):
        def __init__(self, inputs: float, weight: float) -> None:
            super().__init__()
            self.before, self.line = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
            with torch.no_grad():
                self.before.weight.copy_(torch.tensor([[1.0, inputs], [0.0, 0.0]]))
                self.line.weight.copy_(torch.tensor([[weight, 0.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.before(x))

    x = torch.eye(2)
    first, second = Line(3.0, 2.0), Line(1.0, 4.0)
    merged = pleas(first, second, x, match=Matching({"before.weight[0]": torch.arange(2)}))
    assert merged.model.line.weight[0].tolist() == pytest.approx([2.6, 0.0], abs=1e-5)
    plain = pleas(first, second, x, match=Matching({"before.weight[0]": torch.arange(2)}), least_squares=False)
    assert plain.model.line.weight[0].tolist() == [3.0, 0.0]


def test_blocks_of_a_merged_layer() -> None:
    first, second, x = made(mlp, 0), made(mlp, 1), images(mlp)
    merged = pleas(first, second, x, ratio=0.5, least_squares=False)
    (p, q), (c, d) = merged.matching.permutations.values(), merged.matching.similarity.values()
    ins, outs = c >= c.quantile(0.5), d >= d.quantile(0.5)
    w1, w2 = first[3].weight, second[3].weight[q][:, p]  # type: ignore[index]
    zeros = torch.zeros(int((~outs).sum()), int((~ins).sum()))
    expected = torch.cat(
        [
            torch.cat([(w1 + w2)[outs][:, ins] / 2, w1[outs][:, ~ins] / 2, w2[outs][:, ~ins] / 2], 1),
            torch.cat([w1[~outs][:, ins], w1[~outs][:, ~ins], zeros], 1),
            torch.cat([w2[~outs][:, ins], zeros, w2[~outs][:, ~ins]], 1),
        ]
    )
    torch.testing.assert_close(merged.model[3].weight, expected)  # type: ignore[index]
    bias = torch.cat([(first[3].bias + second[3].bias[q])[outs] / 2, first[3].bias[~outs], second[3].bias[q][~outs]])
    torch.testing.assert_close(merged.model[3].bias, bias)  # type: ignore[index]


def test_outputs_of_one_model_never_read_the_other() -> None:
    """Which a published gradient mask has the wrong way round."""
    first, second, x = made(ResNet, 0), made(ResNet, 1), images(ResNet)
    merged = pleas(first, second, x, ratio={"stem.weight[0]": 0.6, "inner.weight[0]": 0.7})
    stream, hidden = (merged.widths[name] for name in ("stem.weight[0]", "inner.weight[0]"))
    weight = merged.model.inner.weight
    apart, hidden_apart = stream - 8, hidden - 12
    assert weight.shape == (hidden, stream, 3, 3) and apart > 0 and hidden_apart > 0
    own, theirs = slice(12 - hidden_apart, 12), slice(12, None)
    assert not weight[own, 8:].any() and not weight[theirs, 8 - apart : 8].any()
    assert weight[own, 8 - apart : 8].all() and weight[theirs, 8:].all() and weight[: 12 - hidden_apart].all()


@pytest.mark.parametrize("budget", [1.0, 1.3, 2.0, 10.0])
def test_a_budget_is_kept(budget: float) -> None:
    first, second, x = made(ResNet, 0), made(ResNet, 1), images(ResNet)
    merged = pleas(first, second, x, budget=budget)
    assert size(merged.model) <= budget * size(first)
    apart = torch.cat([d.sort(descending=True).values for d in merged.matching.distance.values()])
    count = sum(merged.widths.values()) - 20
    assert (count == 0) is (budget == 1.0) and (count == 20) is (budget == 10.0)
    kept = [merged.widths[name] - len(d) for name, d in merged.matching.distance.items()]
    worst = torch.cat(
        [d.sort(descending=True).values[:n] for d, n in zip(merged.matching.distance.values(), kept, strict=True)]
    )
    assert torch.equal(worst.sort(descending=True).values, apart.sort(descending=True).values[:count])


def test_more_units_apart_are_nearer_to_both() -> None:
    first, second, x = made(ResNet, 0), made(ResNet, 1), images(ResNet, 200)
    mean = ((first(x) + second(x)) / 2).detach()
    far = [error(pleas(first, second, x, budget=b, reset_statistics=False).model, mean, x) for b in (1.0, 2.0, 3.0)]
    assert far[0] > far[1] > far[2]


def heads_of(classes: int) -> Callable[[], nn.Module]:
    def kind() -> nn.Module:
        return ResNet(classes=classes)

    return kind


def test_each_model_keeps_its_head() -> None:
    first, second, x = made(heads_of(5), 0), made(heads_of(3), 1), images(ResNet)
    merged = pleas(first, second, x, heads=["fc"], ratio=1.0, reset_statistics=False)
    assert error(merged.use_heads(0), first(x).detach(), x) < 1e-5
    assert error(merged.use_heads(1), second(x).detach(), x) < 1e-5
    assert [merged.heads[which]["fc"].weight.shape for which in (0, 1)] == [(5, 16), (3, 16)]
    assert not merged.heads[0]["fc"].weight[:, 8:].any() and not merged.heads[1]["fc"].weight[:, :8].any()
    with pytest.raises(ValueError, match=r"^second must be like first in 'fc.weight', torch.float32 \(5, 8\) on cpu"):
        pleas(first, second, x)


def test_statistics_are_those_of_the_inputs() -> None:
    first, second, x = made(ResNet, 0), made(ResNet, 1), images(ResNet)
    merged = pleas(first, second, x, batch_size=len(x))
    z = merged.model.stem(x)
    torch.testing.assert_close(merged.model.norm.running_mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(merged.model.norm.running_var, z.transpose(0, 1).flatten(1).var(1))
    assert merged.model.norm.momentum == first.norm.momentum and not merged.model.training


def test_solved_in_several_passes_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, x = made(vit_of_digits, 0), made(vit_of_digits, 1), images(vit_of_digits)
    whole = pleas(first, second, x, ratio=0.5)
    monkeypatch.setattr(solving, "MOST_BYTES", 20_000)
    parted = pleas(first, second, x, ratio=0.5)
    assert parted.solved == whole.solved and len(whole.solved) == 10
    assert all(torch.equal(a, b) for a, b in zip(parted.model.parameters(), whole.model.parameters(), strict=True))


def test_both_models_stay_as_they_are() -> None:
    models, x = [made(ResNet, 0).train(), made(ResNet, 1)], images(ResNet)
    before = copy.deepcopy([model.state_dict() for model in models])
    merged = pleas(*models, x, ratio=0.5)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert models[0].training and merged.model.training
    assert not {x.data_ptr() for x in merged.model.parameters()} & {x.data_ptr() for x in models[0].parameters()}


def test_tied_layers_stay_tied() -> None:
    def kind() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), *(nn.Linear(6, 6) for _ in range(3)))
        model[4].weight = model[3].weight
        return model

    first, second, x = made(kind, 0), made(kind, 1), images(mlp, 100)
    merged = pleas(first, second, x, match="weights")
    assert merged.model[4].weight is merged.model[3].weight  # type: ignore[index]


class OfOneWidth(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out, self.width = nn.Linear(4, width), nn.Linear(width, 3), width

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).view(len(x), self.width).relu())


def test_arguments_are_checked() -> None:
    first, second, x = made(mlp, 0), made(mlp, 1), images(mlp)

    def refused(message: str, *models: nn.Module, inputs: Tensor = x, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            pleas(*(models or (first, second)), inputs, **options)

    refused(r"^ratio must be in \[0, 1\], got 1.5$", ratio=1.5)
    refused("^ratio must have names of groups that can grow, got '3.weight'$", ratio={"3.weight": 0.5})
    refused("^budget must be finite and 1 or greater, got 0.5$", budget=0.5)
    refused("^ratio must be 0 where a budget is given, got 0.5$", budget=2.0, ratio=0.5)
    refused("^match must be one of 'activations', 'weights', got 'luck'$", match="luck")
    refused("^order must be one of 'model', 'layer', got 'block'$", order="block")
    refused("^batch_size must be 1 or greater, got 0$", batch_size=0)
    refused("^batches must hold at least one sample, got none$", inputs=x[:0])
    refused("^match must have permutations of all groups, got none of '1.weight", match=Matching())
    bare = Matching({"1.weight[0]": torch.arange(16), "3.weight[0]": torch.arange(12)})
    unknown = r"^match must say how alike pairs are where some stay apart, got nothing of '1.weight\[0\]'$"
    refused(unknown, match=bare, ratio=0.5)
    refused(unknown, match=bare, budget=2.0)
    refused("^model must give finite outputs, got NaN or infinity$", inputs=torch.full_like(x, torch.nan))
    late = torch.cat([x, torch.full_like(x, torch.inf)])
    refused("^models must be finite at layer '1', got NaN or infinity$", inputs=late, match="weights")
    numbers = torch.randn(8, 4)
    refused(
        r"^first must run with wider layers for a ratio above 0, got .*: its code has their widths$",
        OfOneWidth(6), OfOneWidth(6), inputs=numbers, ratio=0.5,
    )  # fmt: skip
    streams = [nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)) for _ in range(2)]
    refused("^ratio must be 0 for a model none of whose groups can grow, got 0.5$", *streams, inputs=numbers, ratio=0.5)
    two = vit_of_digits()
    for block in two.blocks:  # type: ignore[union-attr]
        block.num_heads = 2
    tied = copy.deepcopy(second)
    tied[5] = nn.Linear(12, 12)  # type: ignore[index]
    free = copy.deepcopy(tied)
    tied.extra, tied.more = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    free.extra = free.more = nn.Parameter(torch.zeros(2))
    refused("^second must have the symmetries of first, got others: the models differ in code or ties$", tied, free)
    refused("^second must have the symmetries of first, got others", vit_of_digits(), two, inputs=images(vit_of_digits))


def test_a_result_says_how_it_was_matched() -> None:
    first, second, x = made(mlp, 0), made(mlp, 1), images(mlp)
    merged = pleas(first, second, x, match="weights", seed=3)
    symmetries = find_symmetries(first, x)
    assert isinstance(merged, Merged) and merged.widths == {"1.weight[0]": 16, "3.weight[0]": 12}
    expected = match_weights(symmetries, first, second, seed=3)
    assert all(torch.equal(merged.matching.permutations[name], p) for name, p in expected.permutations.items())
    given = pleas(first, second, x, match=match_activations(symmetries, first, second, x))
    again = pleas(first, second, x)
    assert all(torch.equal(a, b) for a, b in zip(given.model.parameters(), again.model.parameters(), strict=True))
