"""Every kind of layer is solved for as linear layers of the same maps are, and what cannot be is refused or kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import Calibrated, Sites, calibrate
from tests.encoders import perturbed, samples
from tests.fits import refusal
from tests.surgery.calibrate.models import TASKS, encoder_of, family

pytestmark = pytest.mark.any_isa

BATCHES = {"a": samples(7, 5, 3).double(), "b": samples(4, 5, 3, seed=1).double()}
OPTIONS: list[dict[str, Any]] = [{}, {"residual": True, "unread_weight": 0.2}]
Renamed = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def calibrated(model: nn.Module, **options: Any) -> Calibrated:
    merged, base, experts = family(model)
    return calibrate(merged, base, experts, BATCHES, batch_size=3, progress=False, **options)


def twin_of(model: nn.Module, block: Callable[[], nn.Module], renamed: Renamed) -> nn.Module:
    """A model that computes the same by other layers."""
    twin = encoder_of(block)
    twin.load_state_dict(renamed(model.state_dict()))
    return twin


def assert_alike(
    block: Callable[[], nn.Module], other: Callable[[], nn.Module], renamed: Renamed, **options: Any
) -> None:
    """Both families are one another's twins before and after."""
    merged, base, experts = family(encoder_of(block))
    models = {"merged": merged, "base": base, **experts}
    twins = {name: twin_of(model, other, renamed) for name, model in models.items()}
    with torch.no_grad():
        torch.testing.assert_close(merged(BATCHES["a"]), twins["merged"](BATCHES["a"]))
    results = [
        calibrate(of["merged"], of["base"], {task: of[task] for task in TASKS}, BATCHES, progress=False, **options)
        for of in (models, twins)
    ]
    assert results[0].kept == results[1].kept == ()
    expected = results[1].state
    for name, value in renamed(results[0].state).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-7, msg=name)
    assert not torch.equal(expected["blocks.0.norm.weight"], twins["merged"].state_dict()["blocks.0.norm.weight"])


class Attending(nn.Module):
    """Attention by torch's module, of the tokens to themselves or to others."""

    def __init__(self, batch_first: bool, other: bool, bias: bool = True) -> None:
        super().__init__()
        options: dict[str, Any] = {"kdim": 4, "vdim": 4} if other else {}
        self.norm, self.other, self.batch_first = nn.LayerNorm(8), other, batch_first
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first, **options)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        z = z if self.batch_first else z.transpose(0, 1)
        y = z[..., :4] if self.other else z
        attended = self.attention(z, y, value=y, need_weights=False)[0]
        return x + (attended if self.batch_first else attended.transpose(0, 1))


class AttendingByLayers(nn.Module):
    def __init__(self, other: bool, bias: bool = True) -> None:
        super().__init__()
        dim = 4 if other else 8
        self.norm, self.other = nn.LayerNorm(8), other
        self.q, self.k, self.v = (nn.Linear(size, 8, bias=bias) for size in (8, dim, dim))
        self.out = nn.Linear(8, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        y = z[..., :4] if self.other else z
        q, k, v = (
            layer(t).unflatten(-1, (2, 4)).transpose(1, 2) for layer, t in ((self.q, z), (self.k, y), (self.v, y))
        )
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def unpacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of AttendingByLayers."""
    found = {}
    for name, value in state.items():
        path, attention, last = name.rpartition("attention.")
        if not attention:
            found[name] = value
        elif last in ("in_proj_weight", "in_proj_bias"):
            kind = last.removeprefix("in_proj_")
            found |= {f"{path}{letter}.{kind}": part for letter, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            found[
                name.replace("attention.out_proj", "out").replace("attention.", "").replace("_proj_weight", ".weight")
            ] = value
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("batch_first", "other", "bias"),
    [(True, False, True), (False, False, True), (True, True, True), (True, False, False)],
)
def test_attention(batch_first: bool, other: bool, bias: bool, options: dict[str, Any]) -> None:
    assert_alike(
        lambda: Attending(batch_first, other, bias), lambda: AttendingByLayers(other, bias), unpacked, **options
    )


class Convolving(nn.Module):
    """A convolution over the tokens, in one dimension or two."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(8, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)


class ConvolvingByLayer(nn.Module):
    """The same by one linear layer on the neighbours of each token."""

    def __init__(self, shifts: tuple[int, ...], wraps: bool = False) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(8), nn.Linear(8 * len(shifts), 8)
        self.shifts, self.wraps = shifts, wraps

    def forward(self, x: Tensor) -> Tensor:
        z, places = self.norm(x), torch.arange(x.shape[1])
        near = []
        for shift in self.shifts:
            at = places + shift
            there = torch.ones_like(at, dtype=torch.bool) if self.wraps else (at >= 0) & (at < len(at))
            near.append(torch.where(there[:, None], z[:, at % len(at)], 0.0))
        return x + self.conv(torch.stack(near, -1).flatten(-2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("given", "shifts", "wraps"),
    [
        ({"kernel_size": 3, "padding": 1}, (-1, 0, 1), False),
        ({"kernel_size": 2, "dilation": 2, "padding": "same"}, (-1, 1), False),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (-1, 0, 1), True),
    ],
    ids=["zeros", "dilated", "circular"],
)
def test_convolutions(given: dict[str, Any], shifts: tuple[int, ...], wraps: bool, options: dict[str, Any]) -> None:
    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.flatten(1) if "conv.weight" in name else value for name, value in state.items()}

    assert_alike(lambda: Convolving(**given), lambda: ConvolvingByLayer(shifts, wraps), renamed, **options)


class Patches(nn.Module):
    """A convolution in two dimensions whose kernel is its stride, as patches are embedded."""

    def __init__(self, by_layer: bool) -> None:
        super().__init__()
        self.norm, self.by_layer = nn.LayerNorm(8), by_layer
        self.conv = nn.Linear(8, 8) if by_layer else nn.Conv2d(2, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        if self.by_layer:
            return x + self.conv(z)
        squares = z.reshape(-1, 2, 2, 2)
        return x + self.conv(squares).reshape(x.shape)


def test_patches() -> None:
    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.flatten(1) if "conv.weight" in name else value for name, value in state.items()}

    assert_alike(lambda: Patches(False), lambda: Patches(True), renamed)


class Mapping(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(8)) -> None:
        super().__init__()
        self.norm, self.layer = norm(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transposed_weights_of_transformers(options: dict[str, Any]) -> None:
    from transformers.pytorch_utils import Conv1D

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.T if "layer.weight" in name else value for name, value in state.items()}

    assert_alike(lambda: Mapping(lambda: Conv1D(8, 8)), lambda: Mapping(lambda: nn.Linear(8, 8)), renamed, **options)


class GainRMSNorm(nn.Module):
    """Gemma's: multiplies with 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_norms_that_add_one_to_their_weight(options: dict[str, Any]) -> None:
    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + 1 if "norm.weight" in name else value for name, value in state.items()}

    def block(norm: Callable[[], nn.Module]) -> nn.Module:
        return Mapping(lambda: nn.Linear(8, 8), norm)

    assert_alike(lambda: block(GainRMSNorm), lambda: block(lambda: nn.RMSNorm(8, eps=1e-6)), renamed, **options)


class Twice(nn.Module):
    """One map in two places: a layer that is called twice, or two that share their parameters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8) if tied else self.first
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_map_in_two_places_answers_in_both(tied: bool) -> None:
    lam, teacher = 0.1, 0.6
    merged, base, experts = family(encoder_of(lambda: Twice(tied)))
    result = calibrate(merged, base, experts, BATCHES, lam=lam, teacher=teacher, anchor=1.0, progress=False)
    gram, wanted = torch.zeros(8, 8).double(), torch.zeros(8, 8).double()
    with torch.no_grad():
        for task, x in BATCHES.items():
            inputs = []
            for model in (merged, experts[task]):
                first = model.embed(x).flatten(0, 1)
                inputs.append((first, torch.tanh(model.blocks[0].first(first))))
            places = list(zip(*inputs, strict=True))
            rows = [torch.cat([s for s, _ in places]), torch.cat([teacher * e + (1 - teacher) * s for s, e in places])]
            if tied:  # each place is a layer, and counts as one
                of_places = [(s, teacher * e + (1 - teacher) * s) for s, e in places]
            else:
                of_places = [(rows[0], rows[1])]
            for s, t in of_places:
                g = s.T @ s / len(s)
                k = 1 / float(g.norm())
                gram += k * g
                wanted += k * s.T @ t / len(s) @ experts[task].blocks[0].first.weight.T
        anchor = merged.blocks[0].first.weight
        expected = torch.linalg.solve(gram + (lam + 1e-8) * torch.eye(8).double(), wanted + lam * anchor.T).T
    torch.testing.assert_close(result.state["blocks.0.first.weight"], expected, rtol=1e-8, atol=1e-8)
    assert result.kept == ()
    assert torch.equal(result.state["blocks.0.first.weight"], result.state["blocks.0.second.weight"])


def test_what_is_tied_to_something_else_is_kept() -> None:
    model = encoder_of(lambda: Mapping(lambda: nn.Linear(8, 8)))
    model.before = nn.Linear(8, 8).double()
    model.before.weight = model.blocks[0].layer.weight
    result = calibrate(model, model, {"a": perturbed(model, 1)}, {"a": BATCHES["a"]}, progress=False)
    assert result.kept == ("blocks.0.layer.weight", "blocks.0.layer.bias")


def test_blocks_that_share_parameters_are_refused() -> None:
    model = encoder_of(lambda: Mapping(lambda: nn.Linear(8, 8)))
    whole, part = copy.deepcopy(model), copy.deepcopy(model)
    whole.blocks = nn.ModuleList([whole.blocks[0]] * 2)
    part.blocks[1].layer.weight = part.blocks[0].layer.weight
    sites = Sites(("blocks.0", "blocks.1"))
    for tied, name in ((whole, "norm.weight"), (part, "layer.weight")):
        message = (
            f"merged must not share parameters between blocks, got 'blocks.0.{name}' that is 'blocks.1.{name}' too"
        )
        call = (tied, tied, {"a": tied}, {"a": BATCHES["a"]})
        assert refusal(lambda call=call: calibrate(*call, sites=sites, progress=False)) == message


class Routed(nn.Module):
    """Tokens go to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        which = x[..., 0] > 0
        result = x.clone()
        for i, expert in enumerate(self.experts):
            result[which == i] += expert(x[which == i])
        return result


def test_a_mixture_of_experts_is_refused() -> None:
    sentence = refusal(lambda: calibrated(encoder_of(Routed)))
    assert sentence.startswith(
        "'blocks.0.experts.0' must see every token, not those that a router sends to it, got "
    ) and sentence.endswith(" of 15")
