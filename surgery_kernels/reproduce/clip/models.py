"""CLIP's encoders, from Hugging Face folders of any of its formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from ..errors import InputError

# transformers 5 has one that does without torchvision
ImageProcessor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor

StateDict = dict[str, Tensor]

PROJECTION = "visual_projection.weight"
VISION = ("vision_model.", PROJECTION)
TEXT = ("text_model.", "text_projection.weight")
BARE_VISION = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")  # a vision tower saved without a prefix


class VisionEncoder(CLIPVisionModelWithProjection):
    """CLIP's image encoder: images [batch, 3, height, width] to features [batch, num_features], not yet normalised."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(pixel_values=images).image_embeds


def vision_config(folder: Path) -> Any:
    """Of a CLIPModel, a CLIPVisionModelWithProjection or a CLIPVisionModel."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("clip", "clip_vision_model"):
        raise InputError(f"{folder} must hold a CLIP model, got {config.model_type!r}")
    if config.model_type == "clip_vision_model":
        return config
    config.vision_config.projection_dim = config.projection_dim
    return config.vision_config


def load_vision(folder: Path, pretrained: StateDict | None = None) -> StateDict:
    """Image tower and projection of a checkpoint, in float32 and by the names of `VisionEncoder`.

    Args:
        folder: Of a CLIPModel, a CLIPVisionModelWithProjection or a CLIPVisionModel.
        pretrained: Gives the projection where the checkpoint has none, and the names and shapes that it must have.

    Raises:
        InputError: weights are missing or do not fit `pretrained`.
    """
    state = dict(read_tensors(folder, VISION)) or {
        f"vision_model.{name}": tensor for name, tensor in read_tensors(folder, BARE_VISION)
    }
    if not state:
        raise InputError(f"{folder} must hold the image encoder of a CLIP model, got no tensor 'vision_model...'")
    if pretrained is None:
        if PROJECTION not in state:
            raise InputError(f"{folder} must hold {PROJECTION} for the pretrained model, got no such tensor")
        return state
    state.setdefault(PROJECTION, pretrained[PROJECTION])
    for name, tensor in pretrained.items():
        if name not in state or state[name].shape != tensor.shape:
            got = tuple(state[name].shape) if name in state else "no such tensor"
            raise InputError(f"{folder} must hold {name} {tuple(tensor.shape)} as the pretrained model, got {got}")
    return {name: state[name] for name in pretrained}


def text_encoder(folder: Path) -> nn.Module:
    """CLIP's text encoder with its projection.

    Raises:
        InputError: the folder is not that of a whole CLIPModel.
    """
    config = AutoConfig.from_pretrained(folder)
    state = dict(read_tensors(folder, TEXT))
    if config.model_type != "clip" or not state:
        raise InputError(f"{folder} must hold a CLIPModel with its text encoder, got none: give --heads")
    config.text_config.projection_dim = config.projection_dim
    encoder = CLIPTextModelWithProjection(config.text_config)
    encoder.load_state_dict(state)
    return encoder.eval()


def logit_scale(folder: Path) -> float:
    """What CLIP multiplies cosines with; 100, where all released models ended, if the folder has none."""
    return next((tensor.exp().item() for _, tensor in read_tensors(folder, ("logit_scale",))), 100.0)


def read_tensors(folder: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The parameters whose names start with one of `prefixes`, in float32; nothing else is read."""
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if is_parameter(name, prefixes)]  # noqa: SIM118  # no mapping
                for name in names:
                    yield name, file.get_tensor(name).float()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for name in state:
                if is_parameter(name, prefixes):
                    yield name, state[name].float()


def is_parameter(name: str, prefixes: tuple[str, ...]) -> bool:
    return name.startswith(prefixes) and not name.endswith("position_ids")  # a buffer in older checkpoints


def weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
    raise InputError(f"{folder} must hold model.safetensors or pytorch_model.bin, got neither")


def image_processor(folder: Path) -> Any:
    """How the model wants its images: transformers' processor for PIL, from preprocessor_config.json."""
    if not (folder / "preprocessor_config.json").is_file():
        raise InputError(f"{folder} must hold preprocessor_config.json, got no such file")
    return ImageProcessor.from_pretrained(folder)
