"""A CLIP, its experts and their images, made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from surgery_kernels.reproduce.__main__ import main
from tests.clip_models import (
    CLASSES,
    LABELS_OF_DTD,
    as_clip,
    as_projected_tower,
    as_vision_tower,
    result_folder,
    save_classes,
    save_dataset,
    save_pretrained,
    tiny_clip,
    tuned,
)


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """Matrices this small only lose by a second one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    return tiny_clip(patch_size=16, image_size=32, width=32, depth=2, num_features=16)


@pytest.fixture(scope="package")
def experts(clip: CLIPModel) -> dict[str, CLIPModel]:
    return {name: tuned(clip, seed) for seed, name in enumerate(CLASSES)}


@pytest.fixture(scope="package")
def model_dir(clip: CLIPModel, experts: dict[str, CLIPModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pretrained(clip, folder / "pretrained")
    as_clip(experts["mnist"], folder / "mnist")
    as_vision_tower(experts["eurosat"], folder / "pretrained_eurosat")
    as_projected_tower(experts["dtd"], folder / "DTD")
    return folder


@pytest.fixture(scope="package")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_classes(folder / "mnist" / "test", 0, CLASSES["mnist"])
    save_classes(folder / "mnist" / "train", 7, CLASSES["mnist"], 2)
    save_classes(folder / "eurosat" / "test", 1, CLASSES["eurosat"])
    save_classes(folder / "eurosat" / "train", 8, CLASSES["eurosat"], 2)
    (folder / "eurosat" / "classnames.json").write_text('{"Forest": "forest", "SeaLake": "lake or sea"}')
    save_dataset(folder / "dtd" / "test", 2, CLASSES["dtd"], LABELS_OF_DTD)
    save_dataset(folder / "dtd" / "train", 9, CLASSES["dtd"], [0, 1, 2])
    return folder


@pytest.fixture
def run(model_dir: Path, data_dir: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    def run(*arguments: str) -> dict[str, Any]:
        main(["clip", f"--model-dir={model_dir}", f"--data-dir={data_dir}", f"--out={tmp_path}", *arguments])
        return json.loads((result_folder(tmp_path) / "results.json").read_text())

    yield run
