"""Files as they should be, or a sentence on what they are instead."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_weights(path: Path) -> None:
    """Raises for a file that is missing, empty or a stand-in for one that git-lfs would fetch."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file, got {'a folder' if path.is_dir() else 'none'}")
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        raise ValueError(f"{path} must hold weights, got an empty file")
    if start == LFS_POINTER:
        raise ValueError(f"{path} must hold weights, got a git-lfs pointer to them: run `git lfs pull` in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} must be a JSON file, got: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def files_below(folder: Path) -> Iterator[str]:
    """The names of all files, with "/" in those of deeper ones; nothing hidden, and no folder that is a link."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        # a folder called like weights is no mistake of the name: whoever opens it says what it is
        for name in sorted([*files, *(name for name in folders if name.endswith(".safetensors"))]):
            if not name.startswith("."):
                yield (Path(where) / name).relative_to(folder).as_posix()


def link_out_of(folder: Path, path: Path) -> Path | None:
    """Where a link leads to that leaves `folder`; None for what lies in it, and in the Hub's cache beside it."""
    root, target = folder.resolve(), path.resolve()
    cache = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    return None if any(target.is_relative_to(inside) for inside in (root, *cache)) else target
