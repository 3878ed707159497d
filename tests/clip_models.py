"""Small CLIP models, checkpoints and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModel, CLIPVisionModelWithProjection

from surgery_kernels.reproduce.clip.methods import MERGES, METHODS, SURGERY
from surgery_kernels.reproduce.clip.models import ImageProcessor

CLASSES = {"mnist": ["0", "1", "2"], "eurosat": ["Forest", "SeaLake"], "dtd": ["banded", "polka_dotted", "woven"]}
LABELS_OF_DTD = [2, 0, 1, 0, 2, 1, 1]
IMAGES_PER_CLASS = 5
ROWS = [
    *METHODS[:2],
    *(f"{name}{suffix}" for name in MERGES for suffix in ("", *(f" + {s}" for s in SURGERY.values()))),
]


def tiny_tokenizer() -> CLIPTokenizer:
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=48)


def tiny_clip(*, patch_size: int, image_size: int, width: int, depth: int, num_features: int) -> CLIPModel:
    tokens = len(tiny_tokenizer())
    text = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": tokens,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "max_position_embeddings": 48,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=num_features)).eval()


def save_pretrained(clip: CLIPModel, folder: Path) -> None:
    size = clip.config.vision_config.image_size
    clip.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    ImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)


def tuned(clip: CLIPModel, seed: int) -> CLIPModel:
    """A copy with another image tower; text tower and projection stay."""
    generator = torch.Generator().manual_seed(seed)
    expert = CLIPModel(clip.config).eval()
    expert.load_state_dict(clip.state_dict())
    with torch.no_grad():
        for parameter in expert.vision_model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return expert


def as_clip(expert: CLIPModel, folder: Path) -> None:
    expert.save_pretrained(folder)


def as_vision_tower(expert: CLIPModel, folder: Path) -> None:
    tower = CLIPVisionModel(expert.config.vision_config)
    tower.load_state_dict(expert.vision_model.state_dict())
    tower.save_pretrained(folder)


def as_projected_tower(expert: CLIPModel, folder: Path) -> None:
    config = vision_config_of(expert)
    projected = CLIPVisionModelWithProjection(config)
    projected.vision_model.load_state_dict(expert.vision_model.state_dict())
    projected.visual_projection.load_state_dict(expert.visual_projection.state_dict())
    projected.save_pretrained(folder)


def vision_config_of(clip: CLIPModel) -> Any:
    config = clip.config.vision_config
    config.projection_dim = clip.config.projection_dim
    return config


def picture(task: int, label: int, index: int) -> Image.Image:
    generator = np.random.default_rng((task, label, index))
    pixels = generator.integers(0, 256, (40, 52, 3)) // 2 + 40 * label
    return Image.fromarray(pixels.astype(np.uint8)).convert("L" if index == 0 else "RGB")


def save_classes(folder: Path, task: int, classes: list[str], per_class: int = IMAGES_PER_CLASS) -> None:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            picture(task, label, index).save(folder / name / f"{index}.{'jpg' if index == 1 else 'png'}")


def save_dataset(folder: Path, task: int, classes: list[str], labels: list[int]) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets reads what its save_to_disk wrote; it is optional")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    rows = {"image": [picture(task, label, index) for index, label in enumerate(labels)], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))


def result_folder(out: Path) -> Path:
    """Of the last run."""
    return max(out.glob("clip-*"), key=lambda folder: (folder / "results.json").stat().st_mtime_ns)
