"""What a merge reads: tensors by name, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .parts import Anatomy


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that nobody has read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int  # of the tensor, not of what the file spends on it
    file: Path | None  # None: computed
    offset: int | None  # of its first element in the file, in bytes
    strides: tuple[int, ...] | None = None  # in elements; None: contiguous


@dataclass(frozen=True)
class FileStamp:
    """A file and what changes when somebody writes to it."""

    path: Path
    size: int  # in bytes
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


class Source(Protocol):
    """A model whose tensors are read one at a time."""

    name: str  # as the user wrote it
    folder: Path | None  # where its other files lie
    anatomy: Anatomy  # which those are, and which components it has
    files: tuple[FileStamp, ...]  # those that decide what its tensors are
    config: Mapping[str, Any] | None  # its config.json
    tensors: Mapping[str, TensorInfo]  # in the order of the files
    tied: Mapping[str, str]  # names with the same memory as an earlier one, which is their value
    changed: frozenset[str]  # names whose tensors may differ from those of the base
    notices: tuple[str, ...]  # sentences on what was chosen or left out in reading it

    def tensor(self, name: str) -> Tensor:
        """Contiguous; a view of the file where possible, which nobody may write to."""

    def release(self) -> None:
        """Gives back the memory of what was read; it is read again when needed. Any thread may call it at any time."""

    def close(self) -> None:
        """Lets go of the files; views that were handed out stay valid."""
