"""The tokens of many batches on their way through the blocks: in memory, or in files while they last."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class Streams(AbstractContextManager["Streams"]):
    """A tensor per batch, which every block replaces. With a folder they lie in files below it until the `with` ends;
    one is in memory at a time."""

    def __init__(self, folder: Path | None) -> None:
        self._tensors: list[Tensor] = []
        self._devices: list[torch.device] = []
        self._files: tempfile.TemporaryDirectory[str] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = tempfile.TemporaryDirectory(prefix="streams-", dir=folder)

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def __getitem__(self, batch: int) -> Tensor:
        return self._tensors[batch].to(self._devices[batch])

    def append(self, stream: Tensor) -> None:
        self._devices.append(stream.device)
        self._tensors.append(self._kept(len(self), stream))

    def __setitem__(self, batch: int, stream: Tensor) -> None:
        there = self._tensors[batch]
        if self._files is None or there.shape != stream.shape or there.dtype != stream.dtype:
            self._tensors[batch] = self._kept(batch, stream)
        else:
            there.copy_(stream)

    def _kept(self, batch: int, stream: Tensor) -> Tensor:
        if self._files is None or stream.numel() == 0:
            return stream
        path = Path(self._files.name) / f"{batch}"
        path.unlink(missing_ok=True)
        mapped = torch.from_file(str(path), shared=True, size=stream.numel(), dtype=stream.dtype)
        return mapped.view(stream.shape).copy_(stream)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors = []
        if self._files is not None:
            self._files.cleanup()
