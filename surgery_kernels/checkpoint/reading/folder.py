"""A folder with the weights of a model, or of an adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import files_below, link_out_of, read_json
from .mapped_file import MappedFile
from .parts import INDEX, INDICES, Anatomy, Part, anatomy, read_index, stem_of
from .safetensors_file import read_safetensors
from .source import FileStamp, TensorInfo
from .torch_file import read_torch

CONFIG = "config.json"
QUANTIZATION = "quantization_config"


class Checkpoint:
    """A `Source` whose tensors lie in files; those of a component have its folder in front of their names."""

    def __init__(self, name: str, folder: Path | None, root: Path, found: Anatomy) -> None:
        """Reads the headers of the files of `found`, which lie in `root`."""
        indices, weights = [], {}
        for part in found.parts:
            where = root / part.folder
            if INDICES.fullmatch(part.file):
                indices.append(where / part.file)
                shards = _read_shards(where / part.file)
            else:
                shards = {where / part.file: _read(where / part.file)}
            for path, infos in shards.items():
                weights[path] = {f"{part.prefix}{name}": info for name, info in infos.items()}
        stamps = {path: FileStamp.of(path) for path in weights}
        self.name = name
        self.folder = folder
        self.anatomy = found
        self.files = (*stamps.values(), *map(FileStamp.of, indices))
        self.config = None if folder is None else _config(folder, found.parts)
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for infos in weights.values() for name, info in infos.items()
        }
        self.tied: Mapping[str, str] = _tied(self.tensors)
        self.changed = frozenset(self.tensors)
        linked = [f"{path} is read at {target}" for path in weights if (target := link_out_of(root, path))]
        self.notices: tuple[str, ...] = tuple(linked)
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


def open_file(name: str, path: Path) -> Checkpoint:
    """A file of weights or an index of such; with the folder that it lies in where that has a configuration."""
    folder = path.parent if (path.parent / CONFIG).is_file() else None
    names = frozenset(files_below(path.parent) if folder else [path.name])
    return Checkpoint(name, folder, path.parent, Anatomy((Part("", path.name, stem_of(path.name)),), names))


def open_folder(name: str, folder: Path, names: Collection[str] | None = None) -> Checkpoint:
    """`names`: of all files, where not all are here."""
    names = list(files_below(folder)) if names is None else names
    return Checkpoint(name, folder, folder, anatomy(name, folder, names))


def holds(folder: Path, files: tuple[str, ...]) -> bool:
    return any((folder / f"{file}{end}").exists() for file in files for end in ("", INDEX))


def _read(path: Path) -> dict[str, TensorInfo]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def _read_shards(index: Path) -> dict[Path, dict[str, TensorInfo]]:
    """What the index says is in them; a shard may hold more, such as stale copies."""
    file_of = read_index(index)
    shards = {index.parent / file: _read(index.parent / file) for file in sorted(set(file_of.values()))}
    for tensor, file in file_of.items():
        if tensor not in shards[index.parent / file]:
            raise ValueError(
                f"{index.parent / file} must hold {tensor!r}, which {index.name} lists in it, got no such tensor"
            )
    return {
        path: {tensor: info for tensor, info in infos.items() if file_of.get(tensor) == path.name}
        for path, infos in shards.items()
    }


def _config(folder: Path, parts: Collection[Part]) -> Mapping[str, Any] | None:
    """The model's own; of components only whether one of them is quantized."""
    configs = {part.folder: folder / part.folder / CONFIG for part in parts}
    found = {part: read_json(path) for part, path in configs.items() if path.is_file()}
    quantized = [config[QUANTIZATION] for config in found.values() if config.get(QUANTIZATION)]
    return {**found.get("", {}), QUANTIZATION: quantized[0]} if quantized else found.get("")


def _tied(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    first: dict[TensorInfo, str] = {}
    owner = {name: first.setdefault(info, name) for name, info in tensors.items() if info.nbytes}
    return {name: owner[name] for name in owner if owner[name] != name}
