"""Which units may change places: groups found from a graph of the pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery_kernels.matching import Group, Symmetries, find_symmetries, rules
from tests.encoders import bert, clip, open_clip_token_major, own, timm
from tests.encoders import made as encoder
from tests.matching.models import ResNet, images, made, mlp, resnet_of_torchvision, vit_of_digits, with_depthwise

pytestmark = pytest.mark.any_isa


def found(kind: Callable[[], nn.Module]) -> Symmetries:
    return find_symmetries(made(kind, 0), images(kind, 2))


def members(symmetries: Symmetries, name: str) -> list[tuple[str, int]]:
    (group,) = [group for group in symmetries.groups if group.name == name]
    return [(member.tensor, member.dim) for member in group.members]


def test_a_residual_stream_is_one_group() -> None:
    symmetries = found(ResNet)
    assert [(group.name, group.size, group.can_grow) for group in symmetries.groups] == [
        ("stem.weight[0]", 8, True),
        ("inner.weight[0]", 12, True),
    ]
    parts = ("weight", "bias", "running_mean", "running_var")
    of_norms = [(f"{norm}.{part}", 0) for norm in ("norm", "norm2") for part in parts]
    stream = {("stem.weight", 0), ("inner.weight", 1), ("outer.weight", 0), ("fc.weight", 1), *of_norms}
    assert set(members(symmetries, "stem.weight[0]")) == stream


def test_sums_run_over_the_inputs_of_layers() -> None:
    (stream, hidden) = found(ResNet).groups
    assert {m.tensor for m in stream.members if m.is_read} == {"inner.weight", "fc.weight"}
    assert [m.tensor for m in hidden.members if m.is_read] == ["outer.weight"]
    assert not any(m.is_parameter for m in stream.members if "running" in m.tensor)


def test_heads_have_features_in_an_order_of_their_own() -> None:
    by_name = {group.name: group for group in found(vit_of_digits).groups}
    heads, features = by_name["blocks.0.qkv.weight[0][1]"], by_name["blocks.0.qkv.weight[0][2]"]
    assert (heads.size, heads.within, features.size, features.within) == (4, "", 4, heads.name)
    assert features.shape == (4, 4)
    assert {(m.tensor, m.dim) for m in heads.members} == {
        ("blocks.0.qkv.weight", 0), ("blocks.0.qkv.bias", 0), ("blocks.0.out.weight", 1)
    }  # fmt: skip
    assert not heads.can_grow and not features.can_grow  # their numbers are in the module's code
    stream, hidden = by_name["class_token[0]"], by_name["blocks.0.expand.weight[0]"]
    assert stream.size == 16 and not stream.can_grow and hidden.can_grow  # a layer norm sees the whole stream


@pytest.mark.parametrize("case", [own, clip, bert, timm, open_clip_token_major], ids=lambda case: case.__name__)
def test_encoders_of_every_kind(case: Callable[[], object]) -> None:
    model = encoder(case)  # type: ignore[arg-type]
    assert find_symmetries(model.model, model.inputs).groups  # which have been tried out


def test_resnet_of_torchvision() -> None:
    symmetries = found(resnet_of_torchvision)
    assert [group.size for group in symmetries.groups] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert all(group.can_grow for group in symmetries.groups)


def test_channels_of_a_depthwise_convolution() -> None:
    (group,) = found(with_depthwise).groups
    assert group.can_grow and ("2.weight", 0) in {(m.tensor, m.dim) for m in group.members}


class Layers(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 12, second: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(second, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


OF_TWELVE = [("first.weight[0]", 12)]
OF_THREE_OF_FOUR = [("first.weight[0][0]", 3), ("first.weight[0][1]", 4)]
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int, list[tuple[str, int]]]] = {
    "relu": (torch.relu, 12, OF_TWELVE),
    "in place": (lambda x: x.relu_().mul_(2.0), 12, OF_TWELVE),
    "softmax": (lambda x: x.softmax(-1), 12, OF_TWELVE),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), 12, OF_TWELVE),
    "root of the mean square": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), 12, OF_TWELVE),
    "its own mean": (lambda x: x - x.mean(-1, keepdim=True), 12, OF_TWELVE),
    "transposed twice": (lambda x: x.movedim(-1, 0).transpose(0, 1), 12, OF_TWELVE),
    "gated halves": (lambda x: torch.mul(*x.chunk(2, -1)), 6, [("first.weight[0][1]", 6)]),
    "unequal parts": (lambda x: x.split([5, 7], -1)[1], 7, []),
    "one of three": (lambda x: x.unflatten(-1, (3, 4)).select(-2, 1), 4, [("first.weight[0][1]", 4)]),
    "sums of three": (lambda x: x.view(-1, 3, 4).sum(1), 4, OF_THREE_OF_FOUR),
    "unbound": (lambda x: sum(x.view(-1, 3, 4).unbind(1)), 4, [("first.weight[0][1]", 4)]),  # type: ignore
    "stacked": (lambda x: torch.stack([x, x], 1).flatten(1)[:, ::2], 12, []),
    "all of a slice": (lambda x: x[:, 0:12], 12, OF_TWELVE),
    "a product with itself": (lambda x: (x[:, :, None] @ x[:, None]).diagonal(dim1=1, dim2=2), 12, []),
    "cut in two ways": (lambda x: x.view(-1, 3, 4).mT.reshape(-1, 12).view(-1, 3, 4).flatten(1), 12, []),
    "cumulated": (lambda x: x.cumsum(-1), 12, []),
    "flipped": (lambda x: x.flip(-1), 12, []),
    "normalised groups": (lambda x: F.group_norm(x, 3), 12, OF_THREE_OF_FOUR),
    "pooled": (lambda x: F.avg_pool1d(x[:, None], 2)[:, 0], 6, []),
    "padded": (lambda x: F.pad(x, (1, 0)), 13, []),
    "next to another": (lambda x: torch.cat([x, x], -1), 24, []),
    "repeated": (lambda x: x[:, None].expand(-1, 2, -1).mean(1), 12, OF_TWELVE),
    "with a constant": (lambda x: x + torch.arange(12.0), 12, []),
    "with zeros": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), 12, OF_TWELVE),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_two_layers(name: str) -> None:
    between, second, expected = BETWEEN[name]
    model = Layers(between, second=second)
    if not expected:
        with pytest.raises(ValueError, match="^model must have units that can change places, got none: all are in an "):
            find_symmetries(model, torch.randn(3, 6))
        return
    assert [(group.name, group.size) for group in find_symmetries(model, torch.randn(3, 6)).groups] == expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(4, [("0.weight[0][0]", 4), ("0.weight[0][1]", 2), ("1.weight[0][1]", 3)]), (1, [("0.weight[0]", 8)])],
)
def test_groups_of_a_convolution(groups: int, expected: list[tuple[str, int]]) -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 12, 3, groups=groups), nn.ReLU(), nn.Conv1d(12, 2, 1))
    found = [(group.name, group.size) for group in find_symmetries(model, torch.randn(2, 3, 9)).groups]
    assert found[: len(expected)] == expected


def test_tied_weights_are_one_tensor() -> None:
    model = mlp()
    twice = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    twice[2].weight = twice[0].weight
    with pytest.raises(ValueError, match="got none: all are in an order because of inputs, outputs$"):
        find_symmetries(twice, torch.randn(2, 8))  # the tied weight reads the inputs
    model[3] = nn.Linear(16, 16)
    model[5] = nn.Linear(16, 16)
    model[5].weight = model[3].weight
    model.append(nn.Linear(16, 5))
    symmetries = find_symmetries(model, torch.randn(2, 64))
    assert [(group.name, group.size) for group in symmetries.groups] == [("1.weight[0]", 16)]
    moved = symmetries.permuted(model.state_dict(), {"1.weight[0]": torch.arange(15, -1, -1)})
    assert torch.equal(moved["5.weight"], moved["3.weight"]) and not torch.equal(moved["3.weight"], model[3].weight)


def test_heads_are_left_out() -> None:
    model = nn.ModuleDict({"body": nn.Linear(6, 8), "head": nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))})
    model.forward = lambda x: model["head"](model["body"](x).relu())  # type: ignore[method-assign, assignment]
    both = find_symmetries(model, torch.randn(2, 6))
    assert [group.name for group in both.groups] == ["body.weight[0]", "head.0.weight[0]"]
    (group,) = find_symmetries(model, torch.randn(2, 6), heads=["head"]).groups
    assert group == both.groups[0]
    with pytest.raises(ValueError, match="^heads must be names of modules of the model, got 'tail'$"):
        find_symmetries(model, torch.randn(2, 6), heads=["tail"])


def test_a_model_that_looks_at_values_is_refused() -> None:
    model = Layers(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(ValueError, match="^model must be one that torch.export can trace, got "):
        find_symmetries(model, torch.randn(2, 6))


def test_groups_are_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "cumsum", rules.entrywise)
    model = Layers(lambda x: x.cumsum(-1))
    message = (
        "^model must compute the same with its units in another order, got something else for those of "
        r"'first.weight\[0\]'$"
    )
    with pytest.raises(ValueError, match=message):
        find_symmetries(model, torch.randn(2, 6))


def test_the_model_stays_as_it_is() -> None:
    model = made(ResNet, 0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_symmetries(model, images(ResNet, 3))
    assert model.training and all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_permutations_are_checked() -> None:
    symmetries = found(mlp)
    state = made(mlp, 0).state_dict()
    with pytest.raises(ValueError, match="^permutations must have names of groups, got 'x'$"):
        symmetries.permuted(state, {"x": torch.arange(3)})
    wrong = [torch.arange(15), torch.zeros(16, dtype=torch.int64), torch.arange(16.0)]
    for order in wrong:
        with pytest.raises(ValueError, match=r"^permutations\['1.weight\[0\]'\] must be int64 \[16\] with the numbers"):
            symmetries.permuted(state, {"1.weight[0]": order})


def test_groups_say_what_they_are() -> None:
    group = found(mlp).groups[0]
    assert isinstance(group, Group) and [(m.tensor, m.dim) for m in group.members] == [
        ("1.weight", 0), ("1.bias", 0), ("3.weight", 1)
    ]  # fmt: skip
