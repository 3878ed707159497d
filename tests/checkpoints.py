"""Small checkpoints in every layout that a merge reads."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery_kernels.checkpoint.reading.opening import open_checkpoint

TIES = {"method": "ties", "semantics": "mergekit", "density": 0.5, "scope": "tensor"}  # of `ties_recipe`
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


ADDED = {"README.md", "surgery_kernels.json"}  # what every result of a merge has of its own, beside weights


def state_dict(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four floating-point tensors and one of integers; equal for equal seeds, but for the integers, always equal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 6), "layers.0.weight": (6, 6), "layers.0.bias": (6,), "norm.scale": ()}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "position_ids": torch.arange(6)}


def save_models(folder: Path, models: Sequence[Mapping[str, Tensor]], **options: Any) -> list[str]:
    """Folders "base", "expert0", "expert1", ... of safetensors."""
    names = ["base", *(f"expert{t}" for t in range(len(models) - 1))]
    return [str(save_safetensors(folder / name, model, **options)) for name, model in zip(names, models, strict=True)]


def ties_recipe(folders: Sequence[str], **keys: Any) -> dict[str, Any]:
    """TIES of the base and the experts by `TIES`."""
    experts = [{"model": expert, "parameters": {"density": 0.5, "weight": 1}} for expert in folders[1:]]
    return {"merge_method": "ties", "base_model": folders[0], "models": experts, **keys}


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of everything below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_safetensors(
    folder: Path, tensors: Mapping[str, Tensor], *, num_shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A folder with model.safetensors, or with shards of it and an index."""
    return _save(folder, tensors, "model.safetensors", num_shards, config, save_file)


def save_torch(
    folder: Path, tensors: Mapping[str, Tensor], *, num_shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A folder with pytorch_model.bin, or with shards of it and an index."""
    return _save(folder, tensors, "pytorch_model.bin", num_shards, config, torch.save)


def _save(
    folder: Path, tensors: Mapping[str, Tensor], file: str, num_shards: int, config: Mapping[str, Any] | None, save: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save(dict(tensors), folder / file)
        return folder
    stem, _, end = file.partition(".")
    shard_of = {name: f"{stem}-{1 + i % num_shards:05}-of-{num_shards:05}.{end}" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save({name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}, folder / shard)
    (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def write_safetensors(path: Path, header: Mapping[str, Any] | str, num_bytes: int) -> Path:
    """A file with any header and that many zeros behind it, which take no room on the disk."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)  # what is behind it is aligned, as in every file of the safetensors library
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + num_bytes)
    return path


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Path:
    """A safetensors file of zeros, of any size, which take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    return write_safetensors(path, header, end)


def save_lora(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    whole: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Path:
    """A folder as PEFT writes it: lora_A [rank, inputs] and lora_B [outputs, rank] by module, and whole tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(whole or {})
    for module, (down, up) in factors.items():
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    ranks = [len(down) for down, _ in factors.values()]
    named = {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    configuration = {"peft_type": "LORA", "r": ranks[0] if ranks else 8, "lora_alpha": 16, **options}
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    return folder


def refused(reference: Path | str, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        open_checkpoint(reference)
