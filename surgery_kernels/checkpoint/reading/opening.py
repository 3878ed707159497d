"""What a reference means."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from .folder import MODEL_FILES, holds, open_file, open_folder
from .hub import download
from .lora import open_lora
from .lora_settings import ADAPTER_CONFIG
from .source import Source


def open_checkpoint(reference: str | PathLike[str], *, base: Source | None = None) -> Source:
    """A model by its name, ready to be read tensor by tensor; no more than its headers is read.

    Args:
        reference: A folder in the layout of Hugging Face (model.safetensors or pytorch_model.bin, or shards of them
            with an index), a folder of a LoRA of PEFT (adapter_config.json), a .safetensors file, or else a model of
            the Hub, ``org/name`` or ``org/name@revision``, which is downloaded into the Hub's cache.
        base: What a LoRA is added to, as it was opened; other models do not need it. It stays the caller's to close.

    Returns:
        A `Source`. Files in pickle format are read with torch's `weights_only`.

    Raises:
        FileNotFoundError: there is no such path or model, or a file of it is missing.
        ValueError: a file is not complete or not what its name says, an index and its shards disagree, or a LoRA does
            not belong to `base` or is of a kind that does more than add a product to weights.
        ImportError: a model of the Hub without huggingface_hub.
    """
    name = str(reference)
    path = find_folder(name)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"reference must be a folder or a .safetensors file, got the file {name!r}")
        return open_file(name, path)
    if not (path / ADAPTER_CONFIG).exists():
        return open_folder(name, path)
    if holds(path, MODEL_FILES):
        raise ValueError(f"{name} must be a folder with a model or an adapter, got both: name the file of the model")
    if base is None:
        raise ValueError(f"base must be given for {name}, which is an adapter, got None")
    return open_lora(name, path, base)


def find_folder(reference: str) -> Path:
    """Where the files of a model lie, or the file that it is; a model of the Hub is downloaded."""
    path = Path(reference).expanduser()
    return path if path.exists() else download(reference)
