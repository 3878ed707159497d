"""Checkpoints of the shape of a Llama to merge, and how fast this machine reads and writes files."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inputs import llama_shapes, num_params_of
from safetensors.torch import save_file
from torch import Tensor

NUM_TASKS = 4
DTYPE = torch.bfloat16
BLOCK = 1 << 20


@dataclass(frozen=True)
class Models:
    """A base and experts, each in a folder with its config.json."""

    folder: Path
    num_params: int

    @property
    def files(self) -> list[Path]:
        return [self.folder / name / "model.safetensors" for name in ("base", *(f"e{t}" for t in range(NUM_TASKS)))]

    @property
    def nbytes_merged(self) -> int:
        return self.num_params * DTYPE.itemsize

    def write_recipe(self, path: Path, keys: dict[str, Any], num_experts: int, base_is_listed: bool) -> None:
        """With these keys beside the base and the first experts."""
        base, *experts = (str(file.parent) for file in self.files)
        models = [{"model": model} for model in [base] * base_is_listed + experts[:num_experts]]
        path.write_text(json.dumps({"base_model": base, "models": models, **keys}))


def generate(folder: Path, layers: int, width: int) -> Models:
    """The models in a folder; those that are there already are left as they are."""
    shapes = llama_shapes(layers, width)
    models = Models(folder, num_params_of(shapes))
    if all(file.exists() for file in models.files):
        return models
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "vocab_size": shapes["lm_head.weight"][0],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Sequence[int], std: float) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    base = {name: normal(shape, 0.02).to(DTYPE) for name, shape in shapes.items()}
    for t, file in enumerate(models.files):
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = base if t == 0 else {name: (x + normal(x.shape, 0.002)).to(DTYPE) for name, x in base.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        (file.parent / "config.json").write_text(json.dumps(config))
    return models


def read(files: Sequence[Path]) -> None:
    """Every byte, into a buffer that stays in the cache, by as many threads as torch has."""
    threads = torch.get_num_threads()

    def read_part(path: Path, part: int) -> None:
        size = path.stat().st_size
        block = bytearray(BLOCK)
        with path.open("rb", buffering=0) as file:
            file.seek(size * part // threads)
            while file.tell() < size * (part + 1) // threads and file.readinto(block):
                pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_part, *zip(*itertools.product(files, range(threads)), strict=True)))


def forget(files: Sequence[Path]) -> None:
    """Takes files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(folder: Path, nbytes: int) -> None:
    """A temporary file, through to the disk."""
    block = os.urandom(BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for begin in range(0, nbytes, BLOCK):
            file.write(block[: nbytes - begin])
        os.fsync(file.fileno())
