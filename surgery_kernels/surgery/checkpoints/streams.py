"""Tokens between two blocks, on disk: those behind the last finished block, and those behind the one at work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...checkpoint.writing.durable import fsync_folder


class KeptStreams:
    """Of a model on the texts of one expert. What is set is read after `Stations.advance`."""

    def __init__(self, stations: Stations, name: str, count: int, device: torch.device) -> None:
        self._stations, self._name, self._count, self._device = stations, name, count, device

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, batch: int) -> Tensor:
        return load_file(self._file(self._stations.here, batch))["stream"].to(self._device)

    def __setitem__(self, batch: int, stream: Tensor) -> None:
        self.put(self._stations.next, batch, stream)

    def put(self, folder: Path, batch: int, stream: Tensor) -> None:
        path = self._file(folder, batch)
        save_file({"stream": stream.detach().cpu().contiguous()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def _file(self, folder: Path, batch: int) -> Path:
        return folder / f"{self._name}-{batch}.safetensors"


class Stations:
    """A folder for each number of blocks that the tokens have passed, of which two are there."""

    def __init__(self, folder: Path, passed: int) -> None:
        self._folder, self.passed = folder, passed

    @property
    def here(self) -> Path:
        return self._folder / f"{self.passed}"

    @property
    def next(self) -> Path:
        return self._folder / f"{self.passed + 1}"

    def begin(self, folder: Path) -> None:
        """An empty folder, whatever an earlier run left in it."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def settle(self, folder: Path) -> None:
        """All that is in it is on disk."""
        fsync_folder(folder)
        fsync_folder(self._folder)

    def advance(self) -> None:
        before = self.here
        self.passed += 1
        shutil.rmtree(before, ignore_errors=True)
