"""What lies where in a file that torch.save wrote before torch 1.6: pickles, and behind them the data.

    magic number | version | facts about the machine | content | keys of storages | for each of them, count and data

torch.load tells the tensors, by `weights_only` and without their data; where it lies follows from the keys, which it
keeps to itself. So the pickles are read once more, with everything in them that is not data replaced by nothing.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import MAGIC_NUMBER

COUNT_BYTES = 8  # in front of the data of a storage


class Nothing:
    """Stands for whatever a pickle names; it can be called, filled and given a state, to no effect."""

    def __new__(cls, *_: Any, **__: Any) -> Nothing:
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> Nothing:
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


class Keys(pickle.Unpickler):
    """Imports and runs nothing, and writes down the storages that are asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")  # of strings by Python 2
        self.counts: dict[Any, int] = {}  # elements by key, in the order in which torch.load makes them

    def find_class(self, _module: str, _name: str) -> Any:
        return Nothing

    def persistent_load(self, pid: Any) -> Nothing:
        _, _, key, _, count, *_ = pid
        self.counts.setdefault(key, count)
        return Nothing()


def is_legacy(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(Keys(file).load() == MAGIC_NUMBER)
    except Exception:  # anything but such a file can lead to any
        return False


def read_legacy(path: Path) -> tuple[Any, dict[int, int], str]:
    """What was saved, how many bytes there are at the offset of every storage, and their order in a number.

    The tensors have memory that nobody has touched, and know their offset as those of newer files do.
    """
    storages: list[Any] = []

    def kept(storage: Any, _: str) -> Any:
        storages.append(storage)
        return storage

    with torch.serialization.skip_data(), open(path, "rb") as file:
        content = torch.load(file, map_location=kept, weights_only=True)
    with open(path, "rb") as file:
        _, _, facts = (Keys(file).load() for _ in range(3))
        asked = Keys(file)
        asked.load()
        keys, start, end = Keys(file).load(), file.tell(), file.seek(0, os.SEEK_END)
        by_key = dict(zip(asked.counts, storages, strict=True))
        sizes = {}
        for key in keys:
            storage = by_key[key]
            file.seek(start)
            count = int.from_bytes(file.read(COUNT_BYTES), sys.byteorder)
            start += COUNT_BYTES
            nbytes = count * (storage.nbytes() // max(asked.counts[key], 1))
            storage._checkpoint_offset = start
            sizes[start] = max(0, min(nbytes, end - start))
            start += nbytes
    return content, sizes, "little" if facts.get("little_endian", True) else "big"
