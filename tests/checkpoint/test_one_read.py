"""Whole-model thresholds without a read of their own: the same bytes as from two reads, or two reads."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.checkpoint import merge, one_read, plan
from surgery_kernels.checkpoint.one_read import OneRead
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.writing import journal
from surgery_kernels.merging import expected
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import files_in, save_models, ties_recipe

pytestmark = pytest.mark.any_isa

SHAPES = {"embed.weight": (90, 71), "layers.0.weight": (211, 71), "layers.1.weight": (300, 71), "norm.weight": (71,)}


def models_of(dtype: torch.dtype, change: float = 0.1) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in SHAPES.items()}
    experts = [
        {name: (x.float() + change * torch.randn(x.shape, generator=g)).to(dtype) for name, x in base.items()}
        for _ in range(3)
    ]
    position = {"position": torch.arange(3)}  # not merged
    return [model | position for model in (base, *experts)]


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of a small model is like that of a large one."""
    monkeypatch.setattr(one_read, "CLUSTER", 16)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every merge in one read said of itself."""
    results = []

    def noted(self: OneRead) -> bool:
        results.append(run(self))
        return results[-1]

    run = OneRead.run
    monkeypatch.setattr(OneRead, "run", noted)
    return results


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def noted(self: journal.Journal, decided: Any) -> None:
        found.append(decided)
        decide(self, decided)

    decide = journal.Journal.decide
    monkeypatch.setattr(journal.Journal, "decide", noted)
    return found


def merged(given: dict[str, Any], folder: Path, memory: float, **options: Any) -> dict[str, bytes]:
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "memory_bytes", lambda: memory)
        merge(given, folder / "out", **options)
    return files_in(folder / "out")


def check(given: dict[str, Any], tmp_path: Path, ran: list[bool], success: bool = True, **options: Any) -> None:
    in_two_reads = merged(given, tmp_path / "two", math.inf, **options)
    assert ran == []
    assert merged(given, tmp_path / "one", 0, **options) == in_two_reads
    assert ran == [success]


@pytest.mark.parametrize("arithmetic", ["mergekit", "exact", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bytes(
    tmp_path: Path, ran: list[bool], decisions: list[Any], dtype: torch.dtype, arithmetic: str
) -> None:
    given = ties_recipe(save_models(tmp_path / "models", models_of(dtype)), scope="model")
    given["parameters"] = {**given.get("parameters", {}), "arithmetic": arithmetic}
    check(given, tmp_path, ran)
    assert decisions[0] == decisions[1]


def test_ties_at_the_thresholds(tmp_path: Path, ran: list[bool], decisions: list[Any]) -> None:
    """As many of them stay as from two reads, in the order of the tensors."""
    models = models_of(torch.float32)
    for model in models:
        for name, x in model.items():
            model[name] = (x * 64).round() / 64 if x.is_floating_point() else x
    given = ties_recipe(save_models(tmp_path / "models", models), scope="model", out_dtype="bfloat16")
    check(given, tmp_path, ran)
    assert decisions[0] == decisions[1]


def test_experts_that_keep_all_and_nothing(tmp_path: Path, ran: list[bool], decisions: list[Any]) -> None:
    given = ties_recipe(save_models(tmp_path / "models", models_of(torch.bfloat16)), scope="model")
    for model, density in zip(given["models"], (1.0, 0.3, 0.0), strict=True):
        model["parameters"]["density"] = density
    check(given, tmp_path, ran)
    assert decisions[0]["thresholds"] == decisions[1]["thresholds"]


def test_a_sample_that_is_not_like_the_model(tmp_path: Path, ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "STANDARD_DEVIATIONS", 0)
    monkeypatch.setattr(one_read, "SAMPLE_TIMES", 1)
    given = ties_recipe(save_models(tmp_path / "models", models_of(torch.float32)), scope="model")
    wrong = expected.Expected([0.5] * 3, [0.51] * 3, [0.52] * 3)
    monkeypatch.setattr(expected.Expected, "of", lambda *_: wrong)
    check(given, tmp_path, ran, success=False)


def test_too_much_near_the_thresholds(tmp_path: Path, ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_read, "FEW", 0)
    given = ties_recipe(save_models(tmp_path / "models", models_of(torch.float32, change=0)), scope="model")
    check(given, tmp_path, ran, success=False)


def test_infinities_that_all_models_hold(tmp_path: Path, ran: list[bool]) -> None:
    models = models_of(torch.float32)
    for model in models:
        model["layers.1.weight"][7, 7] = -math.inf
    check(ties_recipe(save_models(tmp_path / "models", models), scope="model"), tmp_path, ran, success=False)


def test_errors_are_those_of_two_reads(tmp_path: Path, ran: list[bool]) -> None:
    models = models_of(torch.float32)
    models[2]["layers.1.weight"][7, 7] = math.nan
    folders = save_models(tmp_path / "models", models)
    message = (
        "experts[1] must be finite, got 1 NaN or infinite values in tensor 'layers.1.weight' "
        f"(experts[0] is {folders[1]}; experts[1] is {folders[2]}; experts[2] is {folders[3]})"
    )
    for memory in (math.inf, 0):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            merged(ties_recipe(folders, scope="model"), tmp_path / str(memory), memory)
        assert list((tmp_path / str(memory)).iterdir()) == []
    assert ran == [False]


def test_a_result_past_the_range_of_its_dtype(tmp_path: Path, decisions: list[Any]) -> None:
    """What an exact merge makes is refused, though a draft is not looked at."""
    models = models_of(torch.float32)
    for model in models[1:]:
        model["layers.0.weight"][3, 3] = 1e5
    given = ties_recipe(save_models(tmp_path / "models", models), scope="model", out_dtype="float16")
    with pytest.raises(RuntimeError, match=r"^merged must be finite, got 1 NaN or infinite values in tensor 'layers.0"):
        merged(given, tmp_path / "one", 0)
    assert len(decisions) == 1 and not (tmp_path / "one" / "out").exists()


@pytest.mark.parametrize(
    ("keys", "options", "once"),
    [
        ({}, {}, True),
        ({"scope": "tensor"}, {}, False),
        ({"dtype": "float64"}, {}, False),  # casts are read into memory, once
        ({"parameters": {"rescale": True}}, {}, False),
        ({"merge_method": "breadcrumbs"}, {}, False),
        ({}, {"nonfinite": "drop"}, False),
    ],
    ids=str,
)
def test_what_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], options: dict[str, Any], once: bool
) -> None:
    given = ties_recipe(save_models(tmp_path, models_of(torch.float32)), scope="model") | keys
    with plan_merge(load_recipe(json.loads(json.dumps(given))), **options) as planned:
        inputs = sum(step.nbytes_read for step in planned.merged)
        for memory in (inputs, inputs - 1):
            monkeypatch.setattr(plan, "memory_bytes", lambda memory=memory: memory)
            assert planned.reads_once == (once and memory < inputs)
            twice = planned.recipe.scope == "model" and not planned.reads_once
            assert planned.nbytes_read == sum(step.nbytes_read for step in planned.steps) + twice * inputs
