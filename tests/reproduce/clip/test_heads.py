"""Heads from text and from files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from surgery_kernels.reproduce.clip.folders import InputError
from surgery_kernels.reproduce.clip.heads import TextHeads, head_from_text, read_head
from surgery_kernels.reproduce.clip.models import text_encoder
from surgery_kernels.reproduce.clip.published import TASKS, canonical
from surgery_kernels.reproduce.clip.templates import TEMPLATES
from tests.clip_models import CLASSES, tiny_tokenizer

pytestmark = pytest.mark.any_isa


def test_heads_from_text(clip: CLIPModel, model_dir: Path, tmp_path: Path) -> None:
    names, templates = ["cat", "striped dog"], ["a photo of a {}.", "{} on {}"]
    head = head_from_text(text_encoder(model_dir / "pretrained"), tiny_tokenizer(), names, templates)
    for row, name in zip(head, names, strict=True):
        tokens = tiny_tokenizer()([f"a photo of a {name}.", f"{name} on {name}"], padding=True, return_tensors="pt")
        with torch.no_grad():
            embedded = clip.text_projection(clip.text_model(**tokens).pooler_output)
        mean = (embedded / embedded.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())

    file = tmp_path / "templates.json"
    file.write_text(json.dumps({"Pets_": templates}))
    heads = TextHeads(model_dir / "pretrained", tmp_path / "heads", templates=file)
    torch.testing.assert_close(heads.head(canonical("Pets_"), names), head)
    other = heads.head("no template", names)  # "a photo of a {}."
    assert other.shape == head.shape and not torch.allclose(other, head)
    assert len(list((tmp_path / "heads").iterdir())) == 2


def test_saved_heads(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Heads that all say the last class, as one file and as a file each."""
    heads = {name: torch.zeros(len(classes), 16) for name, classes in CLASSES.items()}
    direction = torch.randn(16)
    for head in heads.values():
        head[:-1], head[-1] = direction, direction + 1e-3  # decided by the sign of the sum of the features
    save_file(heads, tmp_path / "heads.safetensors")
    (tmp_path / "folder").mkdir()
    save_file({"weight": heads["mnist"]}, tmp_path / "folder" / "mnist.safetensors")
    for name in ("eurosat", "dtd"):
        torch.save(heads[name].half(), tmp_path / "folder" / f"{name}.pt")
    for path in (tmp_path / "heads.safetensors", tmp_path / "folder"):
        for name, head in heads.items():
            torch.testing.assert_close(read_head(path, name), head, atol=1e-3, rtol=1e-3)
    for wrong in (torch.nn.Linear(2, 2), {"a": heads["mnist"], "b": heads["mnist"]}, [1]):
        torch.save(wrong, tmp_path / "folder" / "zoo.pt")
        with pytest.raises(
            InputError, match=r"zoo.pt must hold one tensor \[classes, num_features\], got something else$"
        ):
            read_head(tmp_path / "folder", "zoo")
    (tmp_path / "folder" / "zoo.pt").write_text("text")
    with pytest.raises(InputError, match=r"zoo.pt must hold one tensor \[classes, num_features\], got something else$"):
        read_head(tmp_path / "folder", "zoo")
    with zipfile.ZipFile(tmp_path / "folder" / "dtd.pt") as saved:
        parts = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(tmp_path / "folder" / "dtd.pt", "w") as saved:  # as if it had been written on a GPU
        for name, part in parts.items():
            saved.writestr(name, part.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    torch.testing.assert_close(read_head(tmp_path / "folder", "dtd"), heads["dtd"], atol=1e-3, rtol=1e-3)
    results = run("--methods", "pretrained", f"--heads={tmp_path / 'heads.safetensors'}")
    assert list(results["accuracy"]) == ["pretrained"]
    assert not (tmp_path / "heads").exists()


def test_templates_have_a_place_for_the_class() -> None:
    assert set(TEMPLATES) == set(TASKS)
    counts = {
        "sun397": 2,
        "stanford-cars": 8,
        "resisc45": 18,
        "eurosat": 3,
        "svhn": 1,
        "gtsrb": 3,
        "mnist": 1,
        "dtd": 8,
    }
    assert {task: len(set(templates)) for task, templates in TEMPLATES.items()} == counts
    assert all(text.count("{}") == 1 for texts in TEMPLATES.values() for text in texts)
    assert "aerial photo of the {}." in TEMPLATES["resisc45"] and "i love my {}!" in TEMPLATES["stanford-cars"]


@pytest.mark.parametrize("content", ['{"mnist": "a photo"}', '{"mnist": []}', '["{}"]', "{", '{"mnist": ["no place"]}'])
def test_templates_must_have_their_form(content: str, tmp_path: Path) -> None:
    (tmp_path / "templates.json").write_text(content)
    with pytest.raises(
        InputError, match=r"^--templates must be a JSON file of lists of sentences with {} by task, got"
    ):
        TextHeads(tmp_path, tmp_path, templates=tmp_path / "templates.json")
