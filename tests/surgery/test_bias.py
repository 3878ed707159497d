"""representation_bias, the features it compares, and their plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from surgery_kernels.surgery import (
    Sites,
    SurgeryAdapters,
    SurgeryModel,
    attach,
    collect_features,
    plot_bias,
    plot_features,
    representation_bias,
)
from surgery_kernels.surgery.plots import project
from tests.cases import assert_same
from tests.encoders import CASES, NUM_FEATURES, WIDTH, Case, Encoder, made, perturbed, samples

pytestmark = pytest.mark.any_isa

SITES = ["blocks.0", "blocks.1", ""]


def representations(model: Encoder, x: Tensor) -> list[Tensor]:
    tokens, found = model.embed(x), []
    for block in model.blocks:
        tokens = block(tokens)
        found.append(tokens.mean(dim=1))
    return [*found, model.head(tokens[:, 0])]


@pytest.fixture
def pair() -> tuple[Encoder, nn.Module]:
    model = made(CASES[0]).model
    assert isinstance(model, Encoder)
    return model, perturbed(model, 1)


def attached(model: nn.Module, *blocks: str) -> SurgeryModel:
    adapters = SurgeryAdapters(2, {**dict.fromkeys(blocks, WIDTH), "": NUM_FEATURES}, 4, tasks=["a", "b"], seed=0)
    for up in adapters.up:
        up.data.fill_(0.1)
    return attach(model, adapters)


def test_bias_is_the_mean_distance(pair: tuple[Encoder, Encoder]) -> None:
    x = samples(7, 5, 3)
    features = [representations(model, x) for model in pair]
    expected = [(f - r).abs().mean().item() for f, r in zip(*features, strict=True)]
    forms: list[Any] = [x, TensorDataset(x, torch.zeros(7)), [x[:3], x[3:]]]
    for form in forms:
        for batch_size in (1, 3, 64):
            bias = representation_bias(*pair, form, batch_size=batch_size)
            assert list(bias) == SITES
            assert list(bias.values()) == pytest.approx(expected, rel=1e-5)
    assert list(representation_bias(pair[0], pair[0], x).values()) == [0.0, 0.0, 0.0]
    assert list(representation_bias(*pair, x, Sites(("blocks.1",), "head"))) == ["blocks.1", "head"]
    assert not any(module.training for module in pair[0].modules())


def test_features_are_what_bias_compares(pair: tuple[Encoder, Encoder]) -> None:
    x = samples(7, 5, 3)
    found = collect_features(pair[0], x, batch_size=2)
    assert list(found) == SITES
    for actual, expected in zip(found.values(), representations(pair[0], x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_bias_after_surgery(pair: tuple[Encoder, Encoder]) -> None:
    """V1 leaves the blocks as they are; V2 changes all."""
    x = samples(7, 5, 3)
    before = representation_bias(*pair, x)
    with attached(pair[0]) as surgery:
        after = representation_bias(surgery, pair[1], x, task="a")
        assert list(after) == SITES
        assert [after[site] == before[site] for site in SITES] == [True, True, False]
        with torch.no_grad():
            assert_same(collect_features(surgery, x, task=1)[""], surgery(x, task=1))
    with attached(pair[0], "blocks.0", "blocks.1") as surgery:
        after = representation_bias(surgery, pair[1], x, task="a")
        assert [after[site] == before[site] for site in SITES] == [False, False, False]
        assert representation_bias(surgery, pair[1], x, task="b") != after
    assert representation_bias(*pair, x) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_models_of_every_kind(case: Callable[[], Case]) -> None:
    it = made(case)
    inputs = dict(it.inputs) if isinstance(it.inputs, dict) else it.inputs
    bias = representation_bias(it.model, perturbed(it.model, 1), inputs, batch_size=4)
    assert list(bias) == [*it.blocks, ""]
    assert all(value > 0 for value in bias.values())
    assert set(representation_bias(it.model, it.model, inputs).values()) == {0.0}
    assert collect_features(it.model, inputs)[""].shape == (6, it.num_features)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def test_refused(pair: tuple[Encoder, Encoder]) -> None:
    x = samples(7, 5, 3)
    nan = torch.full((7, 5, 3), math.nan)
    with attached(pair[0]) as surgery:
        assert refusal(lambda: representation_bias(surgery, pair[1], x)) == (
            "task must be given for a model with adapters, got None"
        )
    for call, message in [
        (
            lambda: representation_bias(*pair, x, task="a"),
            "task must be None for a model without adapters, got 'a'",
        ),
        (lambda: representation_bias(*pair, x, batch_size=0), "batch_size must be 1 or greater, got 0"),
        (lambda: representation_bias(*pair, x, num_workers=-1), "num_workers must be 0 or greater, got -1"),
        (lambda: representation_bias(*pair, x[:0]), "batches must hold at least one sample, got none"),
        (
            lambda: representation_bias(*pair, x, Sites(final="nowhere")),
            "sites must be names of modules of merged, got 'nowhere'",
        ),
        (
            lambda: representation_bias(pair[0], Encoder(depth=1), x),
            "sites must be names of modules of expert, got 'blocks.1'",
        ),
        (
            lambda: representation_bias(pair[0], Encoder(num_features=5), x),
            "features of expert at site '' must have shape (7, 12), as in merged, got (7, 5)",
        ),
        (lambda: representation_bias(*pair, nan), "features of merged at site 'blocks.0' must be finite, got NaN"),
        (
            lambda: representation_bias(pair[0], broken(pair[1]), x),
            "features of expert at site '' must be finite, got infinity",
        ),
    ]:
        assert refusal(call) == message


def broken(model: nn.Module) -> nn.Module:
    model.head.bias.data.fill_(math.inf)
    return model


def test_plot_of_bias() -> None:
    biases = {
        "merged": {"blocks.0": 0.1, "blocks.1": 0.3, "": 0.2},
        "V1": {"": 0.1},
        "V2": {"blocks.0": 0.05, "blocks.1": 0.06, "": 0.04},
    }
    figure = plot_bias(biases)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["merged", "V1", "V2"]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1, 2], [2], [0, 1, 2]]
    assert axes.lines[0].get_ydata().tolist() == [0.1, 0.3, 0.2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "final"]
    assert matplotlib.pyplot.get_fignums() == []  # no window is opened or kept
    assert refusal(lambda: plot_bias({})) == "biases must be of at least one method, got none"
    message = "biases must have sites of 'merged' only, got 'head' in 'V1'"
    assert refusal(lambda: plot_bias({**biases, "V1": {"head": 0.1}})) == message


def test_plot_of_features() -> None:
    clouds = {name: samples(20, 5, seed=seed) + seed for seed, name in enumerate(["merged", "surgery", "expert"])}
    figure = plot_features(clouds)
    (axes,) = figure.axes
    assert [points.get_label() for points in axes.collections] == list(clouds)
    for points, cloud in zip(axes.collections, project(list(clouds.values())), strict=True):
        assert_same(torch.from_numpy(points.get_offsets().data), cloud)


def test_projection_keeps_the_two_largest_directions() -> None:
    together = samples(30, 4).double() * torch.tensor([0.1, 3.0, 0.2, 1.0])
    clouds = project([together[:10], together[10:]])
    assert [cloud.shape for cloud in clouds] == [(10, 2), (20, 2)]
    variance = torch.cat(clouds).var(dim=0, correction=0)
    largest = torch.linalg.eigvalsh(together.T.cov(correction=0))[-2:].flip(0)
    torch.testing.assert_close(variance, largest)
    assert project([together, together.float()])[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("clouds", "message"),
    [
        ([], "features must be of at least one model, got none"),
        (
            [torch.zeros(3, 4), torch.zeros(3, 5)],
            "features must have shape [samples, dim] with one dim of 2 or greater, got [(3, 4), (3, 5)]",
        ),
        (
            [torch.zeros(3, 1)],
            "features must have shape [samples, dim] with one dim of 2 or greater, got [(3, 1)]",
        ),
        (
            [torch.zeros(3)],
            "features must have shape [samples, dim] with one dim of 2 or greater, got [(3,)]",
        ),
    ],
    ids=["none", "two widths", "too narrow", "no samples"],
)
def test_clouds_that_cannot_be_projected(clouds: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plot_features({str(i): cloud for i, cloud in enumerate(clouds)})


def test_neither_matplotlib_nor_safetensors_is_imported_early(run_python: Callable[..., str]) -> None:
    program = "import sys, surgery_kernels.surgery; print({'matplotlib', 'safetensors'} & set(sys.modules))"
    assert run_python("-c", program).strip() == "set()"
