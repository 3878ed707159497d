"""Where every tensor of a checkpoint to be written lies: shards, headers and offsets, known before the first byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from ..reading.safetensors_file import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes; of the data behind a header, so that a mapped tensor can be read in full vectors


@dataclass(frozen=True)
class Place:
    """A tensor in a file."""

    shard: int
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its name, its first bytes and how long it is."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Shards in order, and every tensor's place in them."""

    shards: list[Shard]
    places: dict[str, Place]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def index(self) -> str:
        """The text of model.safetensors.index.json."""
        total = sum(place.nbytes for place in self.places.values())
        files = {name: self.shards[place.shard].file for name, place in sorted(self.places.items())}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n"


def lay_out(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_bytes: int) -> Layout:
    """Tensors in the given order, a new shard where the next one would pass `max_shard_bytes` of data."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    for number, names in enumerate(groups):
        header, offsets, nbytes = _header({name: tensors[name] for name in names})
        shards.append(Shard(_file_name(number, len(groups)), header, nbytes))
        places |= {name: Place(number, offset, *tensors[name]) for name, offset in offsets.items()}
    return Layout(shards, {name: places[name] for name in tensors})


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """The header of a file with these tensors, their offsets in the file, and its length."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in _widest_first(tensors):
        dtype, shape = tensors[name]
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name!r} must be of a dtype that safetensors has, got {dtype}")
        begins[name], end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end


def _widest_first(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Iterable[str]:
    """Files have no holes: with narrower elements last, every tensor is aligned to its own."""
    return sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
