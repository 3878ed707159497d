"""The merges of the experiment on CLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import Learned
from surgery_kernels.reproduce.clip.declared import chosen, names
from surgery_kernels.reproduce.clip.folders import find_tasks
from surgery_kernels.reproduce.clip.heads import TextHeads
from surgery_kernels.reproduce.clip.images import Decoder, class_names, open_images
from surgery_kernels.reproduce.clip.methods import MERGES, METHODS
from surgery_kernels.reproduce.clip.models import (
    VisionEncoder,
    image_processor,
    load_vision,
    logit_scale,
    vision_config,
)
from surgery_kernels.reproduce.errors import InputError
from tests.clip_models import CLASSES

pytestmark = pytest.mark.any_isa


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_merges_are_those_of_merge_state_dicts(
    autocast: str | None, run: Callable[..., dict[str, Any]], model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    results = run("--methods", "task_arithmetic", "--surgery", *([f"--autocast={autocast}"] if autocast else []))
    base = load_vision(model_dir / "pretrained")
    experts = [load_vision(task.expert, base) for task in find_tasks(model_dir, data_dir).tasks]
    encoder = VisionEncoder(vision_config(model_dir / "pretrained")).eval()
    encoder.load_state_dict(merge_state_dicts(base, experts, method="task_arithmetic", lam=0.3))
    decoder = Decoder(image_processor(model_dir / "pretrained"), tmp_path / "pixels")
    pixels = decoder.pixels("mnist-test", open_images(data_dir / "mnist" / "test"), at_most=None, seed=0)
    head = TextHeads(model_dir / "pretrained", tmp_path / "heads").head("mnist", CLASSES["mnist"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        features = encoder(pixels[:])
    predicted = (F.normalize(features.float(), dim=1) @ head.T).argmax(1)
    expected = 100 * (predicted == pixels.labels).double().mean().item()
    assert list(results["accuracy"]) == ["task arithmetic"]
    assert results["accuracy"]["task arithmetic"]["mnist"] == pytest.approx(expected)


def test_adamerging_lowers_the_entropy_of_predictions(
    run: Callable[..., dict[str, Any]],
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: list[Learned] = []
    monkeypatch.setitem(MERGES["AdaMerging"], "receive", learned.append)
    monkeypatch.setitem(MERGES["AdaMerging"], "lr", 0.05)
    options = ["--methods", "adamerging", "--surgery", "--adamerging-steps=8", "--batch-size=100"]
    results = run(*options)
    assert list(results["accuracy"]) == ["AdaMerging"]
    (found,) = learned
    assert len(found.losses) == 8 and found.losses[-1] < found.losses[0]

    folder, names = model_dir / "pretrained", ["eurosat", "mnist", "dtd"]
    base = load_vision(folder)
    experts = [load_vision(task.expert, base) for task in find_tasks(model_dir, data_dir).tasks]
    encoder = VisionEncoder(vision_config(folder)).eval()
    encoder.load_state_dict(merge_state_dicts(base, experts, method="task_arithmetic", lam=0.3))
    entropies = []
    for name in names:
        images = open_images(data_dir / name / "test")
        pixels = [images.open(index).convert("RGB") for index in range(len(images))]
        head = TextHeads(folder, tmp_path).head(name, class_names(data_dir / name, images.class_names))
        with torch.no_grad():
            features = encoder(image_processor(folder)(pixels, return_tensors="pt")["pixel_values"])
        scale = logit_scale(folder)
        predicted = torch.distributions.Categorical(logits=scale * F.normalize(features, dim=1) @ head.T)
        entropies.append(predicted.entropy().mean())
    assert found.losses[0].item() == pytest.approx(sum(entropies).item(), rel=1e-4)


def test_declared_methods_are_rows(
    run: Callable[..., dict[str, Any]], model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    wanted = ["slerp", "pcb", "emr", "fisher", "regmean", "atlas"]  # of each kind one
    results = run("--methods", *wanted, "--surgery", "--adamerging-steps=2", "--batch-size=4", "--images=4")
    assert list(results["accuracy"]) == wanted and set(wanted) <= set(names())
    base = load_vision(model_dir / "pretrained")
    experts = [load_vision(task.expert, base) for task in find_tasks(model_dir, data_dir).tasks]
    encoder = VisionEncoder(vision_config(model_dir / "pretrained")).eval()
    decoder = Decoder(image_processor(model_dir / "pretrained"), tmp_path / "pixels")
    pixels = decoder.pixels("mnist-test", open_images(data_dir / "mnist" / "test"), at_most=None, seed=0)
    head = TextHeads(model_dir / "pretrained", tmp_path / "heads").head("mnist", CLASSES["mnist"])
    for name, options in (("pcb", {}), ("emr", {"task": 1})):  # the model of its own task, the second
        encoder.load_state_dict(merge_state_dicts(base, experts, method=name, **options))
        with torch.no_grad():
            predicted = (F.normalize(encoder(pixels[:]), dim=1) @ head.T).argmax(1)
        expected = 100 * (predicted == pixels.labels).double().mean().item()
        assert results["accuracy"][name]["mnist"] == pytest.approx(expected)


def test_methods_are_checked(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    assert chosen(["all"]) == (*METHODS, *names()) and chosen(["ties", "pcb"]) == ("ties", "pcb")
    with pytest.raises(InputError, match=r"^--methods must be all, or of pretrained, .*, got sleep$"):
        chosen(["ties", "sleep"])
