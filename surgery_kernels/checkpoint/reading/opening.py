"""What a reference means."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from .folder import holds, open_file, open_folder
from .hub import download
from .lora import open_lora
from .lora_settings import ADAPTER_CONFIG
from .parts import INDICES, MODEL_FILES, READABLE
from .quantized import check_file
from .source import Source


def open_checkpoint(
    reference: str | PathLike[str], *, base: Source | None = None, lora_dtype: torch.dtype | None = None
) -> Source:
    """A model by its name, ready to be read tensor by tensor; no more than its headers is read.

    Args:
        reference: A folder in the layout of Hugging Face, diffusers, sentence-transformers, timm or open_clip
            (safetensors or PyTorch files, whole or in shards with an index, in components or not), a folder of a LoRA
            of PEFT (adapter_config.json), a file of weights (.safetensors, .bin, .pt, .pth, .ckpt) or an index of
            shards, or else a model of the Hub, ``org/name`` or ``org/name@revision``, which is downloaded into the
            Hub's cache.
        base: What a LoRA is added to, as it was opened; other models do not need it. It stays the caller's to close.
        lora_dtype: Of what a LoRA changes; None: that of `base`.

    Returns:
        A `Source`. Files in pickle format are read with torch's `weights_only`.

    Raises:
        FileNotFoundError: there is no such path or model, or a file of it is missing.
        ValueError: a file is not complete or not what its name says, an index and its shards disagree, nothing says
            which of several files counts, or a LoRA does not belong to `base` or is of a kind that does more than add a
            product to weights.
        ImportError: a model of the Hub without huggingface_hub.
    """
    name = str(reference)
    path = Path(reference).expanduser()
    path, names = (path, None) if path.exists() else download(name)
    if path.is_file():
        check_file(path)
        if not (path.name.endswith(READABLE) or INDICES.fullmatch(path.name)):
            raise ValueError(
                f"reference must be a folder, an index or a file of weights ({', '.join(READABLE)}), got {name!r}"
            )
        return open_file(name, path)
    if not (path / ADAPTER_CONFIG).exists():
        return open_folder(name, path, names)
    if holds(path, MODEL_FILES):
        raise ValueError(f"{name} must be a folder with a model or an adapter, got both: name the file of the model")
    if base is None:
        raise ValueError(f"base must be given for {name}, which is an adapter, got None")
    return open_lora(name, path, base, lora_dtype)


def find_folder(reference: str) -> Path:
    """Where the small files of a model lie; for a model of the Hub they are downloaded, its weights are not."""
    path = Path(reference).expanduser()
    return path if path.exists() else download(reference, weights=False)[0]
