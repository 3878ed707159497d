"""What lies where in a file of torch.save."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .files import check_weights
from .legacy_torch_file import is_legacy, read_legacy
from .source import TensorInfo
from .state_dict import state_dict

# Bytes in front of an entry's name, extra bytes and data; the last four are the lengths of the first two.
ENTRY_HEADER = 30
BYTE_ORDER = "/byteorder"  # the end of an entry's name
HARMLESS: list[Any] = [argparse.Namespace]  # the options of a training, beside the weights in many files
GLOBAL = re.compile(r"GLOBAL (\S+)")  # in torch's refusals


@dataclass
class Archive:
    """What the zip format says of a file, whatever the pickle in it claims."""

    sizes: dict[int, int] = field(default_factory=dict)  # of every entry by the offset of its data, in bytes
    compressed: list[str] = field(default_factory=list)
    byte_order: str = "little"  # of files older than the entry that tells it


def read_torch(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, in the order in which they lie there; reads all but their data.

    torch.load runs with `weights_only` and without memory for the tensors, and tells where it would have read them; of
    files from before torch 1.6, which are no archives, `legacy_torch_file.py` finds that out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no dict of dense tensors, is not what torch.save writes, or asks for code to be run.
    """
    check_weights(path)
    if zipfile.is_zipfile(path):
        content, sizes = _read_zip(path)
    elif is_legacy(path):
        with _refusing(path), torch.serialization.safe_globals(HARMLESS):
            content, sizes, byte_order = read_legacy(path)
        _check_byte_order(path, byte_order)
    else:
        raise ValueError(
            f"{path} must be complete and in a format of torch.save, got another: load it and save it again"
        )
    infos = {name: _info(path, name, tensor, sizes) for name, tensor in state_dict(path, content).items()}
    return dict(sorted(infos.items(), key=lambda item: item[1].offset or 0))


def _read_zip(path: Path) -> tuple[Any, dict[int, int]]:
    """What was saved, in tensors without memory, and how many bytes there are at the offset of every entry."""
    with _refusing(path):
        archive = _read_archive(path)
    if archive.compressed:
        raise ValueError(f"{path} must be an archive without compression, got {archive.compressed[0]!r} compressed")
    _check_byte_order(path, archive.byte_order)
    with _refusing(path), FakeTensorMode(), torch.serialization.safe_globals(HARMLESS):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return content, archive.sizes


def _check_byte_order(path: Path, byte_order: str) -> None:
    if byte_order != sys.byteorder:
        raise ValueError(f"{path} must be from a {sys.byteorder}-endian machine, got {byte_order!r}")


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken archive or pickle can lead to any
        reason = str(error).strip().partition("\n")[0]
        if asked := GLOBAL.search(str(error)):
            reason = f"one that runs {asked[1]}: where you trust it, load it and save its state dict as safetensors"
        raise ValueError(f"{path} must be a file of tensors by torch.save, got: {reason}") from None


def _info(path: Path, name: str, tensor: Tensor, sizes: dict[int, int]) -> TensorInfo:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{path} must hold dense tensors, got another layout for {name!r}")
    shape, strides, itemsize = tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
    storage: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    start = itemsize * int(tensor.storage_offset())
    end = start
    if tensor.numel():
        end += itemsize * (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))
    # what the pickle says about sizes is believed only as far as the archive has them
    size = sizes.get(storage, 0)
    if tensor.numel() and (storage not in sizes or end > size):
        raise ValueError(f"{path} must hold the data of {name!r}, {end} bytes, got {size}")
    contiguous = None if tensor.is_contiguous() else strides
    return TensorInfo(tensor.dtype, shape, tensor.nbytes, path, max(storage, 0) + start, contiguous)


def _read_archive(path: Path) -> Archive:
    found = Archive()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                found.compressed.append(entry.filename)
            if entry.filename.endswith(BYTE_ORDER):
                found.byte_order = archive.read(entry).decode()
            file.seek(entry.header_offset + ENTRY_HEADER - 4)
            lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
            offset = entry.header_offset + ENTRY_HEADER + sum(lengths)
            found.sizes[offset] = min(entry.file_size, end - offset)
    return found
