"""The experiment on CLIP, end to end on models and images made here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel

from surgery_kernels.reproduce.__main__ import main
from surgery_kernels.reproduce.clip import images as clip_images
from surgery_kernels.reproduce.clip import published
from surgery_kernels.reproduce.clip.methods import MERGES, SURGERY
from surgery_kernels.reproduce.clip.models import image_processor
from surgery_kernels.reproduce.clip.published import Architecture
from surgery_kernels.surgery import SurgeryAdapters
from tests.clip_models import (
    CLASSES,
    IMAGES_PER_CLASS,
    LABELS_OF_DTD,
    ROWS,
    as_vision_tower,
    picture,
    result_folder,
    save_pretrained,
    tiny_clip,
    tiny_tokenizer,
    tuned,
)

pytestmark = pytest.mark.any_isa

CLOSED_FORM = ("closed_form", "calibrate+closed_form")


@torch.no_grad()
def expected_accuracy(vision: CLIPModel, text: CLIPModel, folder: Path, task: str, prompts: list[list[str]]) -> float:
    """By transformers alone: pictures through the processor, one class after the other."""
    processor, tokenizer = image_processor(folder), tiny_tokenizer()
    number = list(CLASSES).index(task)
    labels = LABELS_OF_DTD if task == "dtd" else [c for c in range(len(CLASSES[task])) for _ in range(IMAGES_PER_CLASS)]
    indices = range(len(labels)) if task == "dtd" else [index % IMAGES_PER_CLASS for index in range(len(labels))]
    pictures = []
    for label, index in zip(labels, indices, strict=True):
        image = picture(number, label, index)
        if task != "dtd" and index == 1:
            image = through_jpeg(image)
        pictures.append(image.convert("RGB"))
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    features = vision.visual_projection(vision.vision_model(pixel_values=pixels).pooler_output)
    rows = []
    for sentences in prompts:
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        embedded = text.text_projection(text.text_model(**tokens).pooler_output)
        mean = (embedded / embedded.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    cosine = F.normalize(features, dim=1) @ torch.stack(rows).T
    return 100 * (cosine.argmax(1) == torch.tensor(labels)).double().mean().item()


def through_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg")
    return Image.open(buffer)


PROMPTS = {
    "mnist": [[f'a photo of the number: "{digit}".'] for digit in "012"],
    "eurosat": [
        [f"a centered satellite photo of {article}{name}." for article in ("", "a ", "the ")]
        for name in ("forest", "lake or sea")
    ],
    "dtd": [
        [f"a photo of {a} {name} {noun}." for a in ("a", "the") for noun in ("texture", "pattern", "thing", "object")]
        for name in ("banded", "polka dotted", "woven")
    ],
}


def test_whole_experiment(
    run: Callable[..., dict[str, Any]],
    clip: CLIPModel,
    experts: dict[str, CLIPModel],
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = run(
        *("--steps=3", "--adamerging-steps=2", "--batch-size=4", "--rank=2", "--v2-rank=2", "--test-batch-size=4"),
        "--images=4",
    )
    printed = capsys.readouterr().out
    assert list(results["accuracy"]) == ROWS
    assert results["published average"] is None and results["architecture"] == "An unpublished CLIP"
    assert results["settings"]["model_dir"] == str(model_dir) and results["settings"]["steps"] == 3
    for name, by_task in results["accuracy"].items():
        assert list(by_task) == ["eurosat", "mnist", "dtd"]  # the paper's order
        assert all(0 <= value <= 100 for value in by_task.values())
        assert results["average"][name] == pytest.approx(sum(by_task.values()) / 3)

    for task, prompts in PROMPTS.items():
        for name, vision in (("pretrained", clip), ("individual", experts[task])):
            expected = expected_accuracy(vision, clip, model_dir / "pretrained", task, prompts)
            assert results["accuracy"][name][task] == pytest.approx(expected), (name, task)

    in_closed_form = [f"{name} + {repair}" for name in MERGES for repair in list(SURGERY.values())[2:]]
    assert list(results["held out"]) == in_closed_form  # the others saw every image
    for name, by_task in results["held out"].items():
        for task, value in by_task.items():
            number = {"mnist": 15, "eurosat": 10, "dtd": 7}[task]
            right, right_unseen = results["accuracy"][name][task] * number / 100, value * (number - 4) / 100
            assert right_unseen == pytest.approx(round(right_unseen)) and 0 <= round(right - right_unseen) <= 4

    folder = result_folder(tmp_path)
    text = (folder / "results.txt").read_text()
    assert text in printed and "published" not in text
    assert "dtd: 7 of 7 test images, 3 classes (banded, polka dotted, woven)" in printed
    assert "adapters see the test images, never a label" in printed
    assert (folder / "average_accuracy.png").read_bytes().startswith(b"\x89PNG")
    for options in MERGES.values():
        v1, v2 = (SurgeryAdapters.load(folder / f"{options['method']}-{mode}.safetensors") for mode in ("v1", "v2"))
        assert v1.tasks == v2.tasks == ("eurosat", "mnist", "dtd") and v1.rank == v2.rank == 2
        assert list(v1.widths.values()) == [16] and list(v2.widths.values()) == [32, 32, 16]
        assert all(up.any() for up in (*v1.up, *v2.up))
        closed = [SurgeryAdapters.load(folder / f"{options['method']}-{mode}.safetensors") for mode in CLOSED_FORM]
        assert all(x.kind == "linear" and x.rank == 2 and x.widths == v2.widths for x in closed)
        assert not torch.equal(closed[0].down[0], closed[1].down[0])


@pytest.mark.parametrize("autocast", [[], ["--autocast=bfloat16"]], ids=["float32", "bfloat16"])
def test_proportions_of_l14(autocast: list[str], data_dir: Path, tmp_path: Path) -> None:
    """Patches of 14 pixels, tokens of another number than rows, deeper and wider, SurgeryV2 at rank 4."""
    torch.manual_seed(1)
    clip = tiny_clip(patch_size=14, image_size=56, width=64, depth=3, num_features=24)
    save_pretrained(clip, tmp_path / "models" / "large")
    for seed, name in enumerate(("mnist", "dtd")):
        as_vision_tower(tuned(clip, seed), tmp_path / "models" / f"large_{name}")
    folders = [f"--model-dir={tmp_path / 'models'}", f"--data-dir={data_dir}", f"--out={tmp_path}"]
    options = ["--pretrained=large", "--methods", "average", "--surgery", "v1", "v2", "closed_form", "--steps=2"]
    options += ["--v2-rank=4", "--adapt-split=train"]
    main(["clip", *folders, *options, *autocast])
    results = json.loads((result_folder(tmp_path) / "results.json").read_text())
    merged = "weight averaging"
    repairs = ("Surgery", "SurgeryV2", "closed form")
    assert list(results["accuracy"]) == [merged, *(f"{merged} + {repair}" for repair in repairs)]
    assert not results["held out"]  # no test image was seen
    assert list(results["accuracy"][merged]) == ["mnist", "dtd"]
    adapters = SurgeryAdapters.load(result_folder(tmp_path) / "average-v2.safetensors")
    assert list(adapters.widths.values()) == [64, 64, 64, 24] and adapters.rank == 4


def test_second_run_decodes_nothing_and_repeats_the_first(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--methods", "ties", "--surgery", "v1", "--steps=2", "--max-images=6")
    first = run(*options)
    monkeypatch.setattr(clip_images.Decoder, "_decode", None)
    monkeypatch.setattr("surgery_kernels.reproduce.clip.heads.text_encoder", None)
    assert run(*options) == first
    assert "6 of 15 test images" in capsys.readouterr().out
    assert len(list((tmp_path / "pixels").iterdir())) == len(list((tmp_path / "heads").iterdir())) == 3


def test_published_averages_stand_beside_ours(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"width": 32, "depth": 2, "patch_size": 16, "v2_rank": 3}
    tiny = Architecture("tiny", **shape, averages={"pretrained": 12.34}, others={"WEMoE": 89.5, "EMR": 88.7})
    monkeypatch.setattr(published, "ARCHITECTURES", (tiny,))
    options = ["--methods", "pretrained", "average", "--surgery", "v2", "--steps=1"]
    assert run(*options)["published average"] is None  # of other tasks
    monkeypatch.setattr("surgery_kernels.reproduce.clip.experiment.TASKS", tuple(CLASSES))
    capsys.readouterr()
    results = run(*options)
    assert results["published average"] == {"pretrained": 12.34} and results["architecture"] == "tiny"
    *_, told, reported, _ = capsys.readouterr().out.split("\n\n")
    assert reported == "Reported by others: WEMoE 89.5; EMR 88.7"
    header, _, pretrained, merged, repaired = told.splitlines()
    assert header.split()[-2:] == ["average", "published"] and pretrained.split()[-1] == "12.3"
    assert len(merged) < len(pretrained) and repaired.split()[:2] == ["+", "SurgeryV2"]
