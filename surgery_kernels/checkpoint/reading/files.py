"""Files as they should be, or a sentence on what they are instead."""

from __future__ import annotations

import json
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
