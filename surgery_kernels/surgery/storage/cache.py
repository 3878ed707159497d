"""Features of many samples, computed once: in memory, or in memory-mapped files that a later run finds again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

Fill = Callable[[Tensor], None]


def cached(folder: Path | None, name: str, shape: tuple[int, int], dtype: torch.dtype, key: str, fill: Fill) -> Tensor:
    """A tensor [rows, dim] that `fill` writes, unless `folder` holds that of the same name and key."""
    if folder is None:
        rows = torch.empty(shape, dtype=dtype)
        fill(rows)
        return rows
    file = folder / f"{quote(name, safe='')}.npy"
    written_for = file.with_suffix(".json")  # exists only beside a complete file
    numpy_dtype = str(dtype).removeprefix("torch.")
    expected = json.dumps({"key": key, "shape": shape, "dtype": numpy_dtype})
    if not (written_for.exists() and file.exists() and written_for.read_text() == expected):
        folder.mkdir(parents=True, exist_ok=True)
        written_for.unlink(missing_ok=True)
        mapped = np.lib.format.open_memmap(file, mode="w+", dtype=numpy_dtype, shape=shape)
        fill(torch.from_numpy(mapped))
        mapped.flush()
        written_for.write_text(expected)
    return torch.from_numpy(np.lib.format.open_memmap(file, mode="c"))


def fingerprint(values: Iterable[object]) -> str:
    """Changes when any value does: tensors and mappings of them by their bytes, anything else by its repr."""
    digest = hashlib.sha256()
    for value in values:
        _update(digest, value)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, value: object) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            digest.update(repr(name).encode())
            _update(digest, item)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())
