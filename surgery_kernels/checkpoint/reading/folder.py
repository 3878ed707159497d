"""A folder with the weights of a model, or of an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import read_json
from .mapped_file import MappedFile
from .safetensors_file import read_safetensors
from .source import FileStamp, TensorInfo
from .torch_file import read_torch

CONFIG = "config.json"
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")  # of several, the first is the model, as for transformers
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OUTSIDE = re.compile(r"[/\\:]|^\.\.$")  # in names of what may lie elsewhere
INDEX = ".index.json"  # behind the name of a model file that is split into shards


class Checkpoint:
    """A `Source` whose tensors lie in files."""

    def __init__(
        self,
        name: str,
        folder: Path | None,
        weights: Mapping[Path, Mapping[str, TensorInfo]],
        index: Path | None = None,
    ) -> None:
        stamps = {path: FileStamp.of(path) for path in weights}
        self.name = name
        self.folder = folder
        self.files = (*stamps.values(), *(() if index is None else (FileStamp.of(index),)))
        self.config: Mapping[str, Any] | None = None
        if folder is not None and (folder / CONFIG).is_file():
            self.config = read_json(folder / CONFIG)
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for infos in weights.values() for name, info in infos.items()
        }
        self.tied: Mapping[str, str] = _tied(self.tensors)
        self.changed = frozenset(self.tensors)
        self.notices: tuple[str, ...] = ()
        self._maps = {path: MappedFile(stamp) for path, stamp in stamps.items()}

    def tensor(self, name: str) -> Tensor:
        info = self.tensors[name]
        assert info.file is not None
        return self._maps[info.file].tensor(info)

    def release(self) -> None:
        for mapped in self._maps.values():
            mapped.release()

    def close(self) -> None:
        for mapped in self._maps.values():
            mapped.close()


def open_file(name: str, path: Path, folder: Path | None = None) -> Checkpoint:
    return Checkpoint(name, folder, {path: _read(path)})


def open_folder(name: str, folder: Path) -> Checkpoint:
    for file in MODEL_FILES:
        if (folder / file).exists():
            return open_file(name, folder / file, folder)
        if (folder / f"{file}{INDEX}").exists():
            return _open_shards(name, folder, folder / f"{file}{INDEX}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise FileNotFoundError(
        f"{name} must be a folder with {', '.join(f'{file}[{INDEX}]' for file in MODEL_FILES)} or "
        f"adapter_config.json, got a folder with {found}"
    )


def holds(folder: Path, files: tuple[str, ...]) -> bool:
    return any((folder / f"{file}{end}").exists() for file in files for end in ("", INDEX))


def _read(path: Path) -> dict[str, TensorInfo]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def _open_shards(name: str, folder: Path, index: Path) -> Checkpoint:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} must hold a weight_map from names of tensors to files, got {shard_of!r}")
    for file in shard_of.values():
        # a path would let the index of a download read any file of this machine
        if not isinstance(file, str) or OUTSIDE.search(file):
            raise ValueError(f"{index} must name files of its own folder, got {file!r}")
    shards = {folder / file: _read(folder / file) for file in sorted(set(shard_of.values()))}
    for path, infos in shards.items():
        for tensor in infos:
            if shard_of.get(tensor) != path.name:
                listed = f"in {shard_of[tensor]}" if tensor in shard_of else "nowhere"
                raise ValueError(f"{index} must list {tensor!r} in {path.name}, where it is, got it {listed}")
    for tensor, file in shard_of.items():
        if tensor not in shards[folder / file]:
            raise ValueError(
                f"{folder / file} must hold {tensor!r}, which {index.name} lists in it, got no such tensor"
            )
    return Checkpoint(name, folder, shards, index)


def _tied(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    first: dict[TensorInfo, str] = {}
    owner = {name: first.setdefault(info, name) for name, info in tensors.items() if info.nbytes}
    return {name: owner[name] for name in owner if owner[name] != name}
