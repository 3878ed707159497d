"""Where every tensor of a checkpoint to be written lies: shards, headers and offsets, known before the first byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import PurePosixPath

import torch

from ..reading.expert_layouts import Piece
from ..reading.safetensors_file import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes; of the data behind a header, so that a mapped tensor can be read in full vectors
SHARD = re.compile(r"(?P<stem>.+)-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Place:
    """A tensor in a file."""

    shard: int
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = (
        None  # in elements, of a part of a tensor that others lie between; None: contiguous
    )

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its name within the folder of the result, its first bytes and how long it is."""

    file: str
    part: str  # in front of the names of its tensors, but not in the file: the component that it belongs to
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Shards in order, and every tensor's place in them."""

    shards: list[Shard]
    places: dict[str, Place]  # of every tensor that is written, some of which are parts of those in the files
    inside: frozenset[str] = frozenset()  # the names of such parts, which the files do not have

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def indices(self) -> dict[str, str]:
        """The text of every model.safetensors.index.json by its file: of parts in more than one shard."""
        files: dict[str, dict[str, str]] = {}
        nbytes: dict[str, int] = {}
        for name, place in sorted(self.places.items()):
            if name in self.inside:
                continue
            shard = self.shards[place.shard]
            if found := SHARD.fullmatch(shard.file):
                index = f"{found['stem']}.safetensors.index.json"
                files.setdefault(index, {})[name.removeprefix(shard.part)] = PurePosixPath(shard.file).name
                nbytes[index] = nbytes.get(index, 0) + place.nbytes
        return {
            index: json.dumps({"metadata": {"total_size": nbytes[index]}, "weight_map": file_of}, indent=2) + "\n"
            for index, file_of in files.items()
        }


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    max_shard_bytes: int,
    parts: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Tensors in the given order, a new shard where the next one would pass `max_shard_bytes` of data.

    Args:
        parts: Of what has components with files of their own: the files' names without number and ending, by what is
            in front of the names of the tensors. None: one model.
        metadata: Of every file, besides its format.
    """
    parts = {"": "model"} if parts is None else parts
    longest_first = sorted(parts, key=len, reverse=True)
    tensors_of: dict[str, list[str]] = {part: [] for part in parts}
    for name in tensors:
        tensors_of[next(part for part in longest_first if name.startswith(part))].append(name)
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    for part, stem in parts.items():
        groups = _groups({name: tensors[name] for name in tensors_of[part]}, max_shard_bytes)
        for number, names in enumerate(groups):
            own = {name.removeprefix(part): tensors[name] for name in names}
            header, offsets, nbytes = _header(own, metadata or {})
            places |= {
                f"{part}{name}": Place(len(shards), at, *tensors[f"{part}{name}"]) for name, at in offsets.items()
            }
            shards.append(Shard(_file_name(stem, number, len(groups)), part, header, nbytes))
    return Layout(shards, {name: places[name] for name in tensors})


def with_parts(layout: Layout, pieces: Mapping[str, Piece]) -> Layout:
    """The layout of tensors that are written piece by piece."""
    places = dict(layout.places)
    for name, piece in pieces.items():
        of = layout.places[piece.fused]
        offset = of.offset + piece.start * of.dtype.itemsize
        places[name] = Place(of.shard, offset, of.dtype, piece.shape, piece.strides)
    return replace(layout, places=places, inside=frozenset(pieces))


def _groups(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    return groups


def _file_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The header of a file with these tensors, their offsets in the file, and its length."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
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
