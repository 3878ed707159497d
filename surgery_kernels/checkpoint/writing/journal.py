"""What a merge has finished so far, kept on disk so that a killed one can go on."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from .durable import fsync_folder


class Journal:
    """Lines of JSON: whose merge it is, what was decided for the whole model, which tensors are safely on disk."""

    def __init__(self, path: Path, identity: str) -> None:
        """Opens the journal of the merge called `identity`, or begins it.

        Raises:
            ValueError: the file belongs to another merge, or another process is writing it.
        """
        self.done: set[str] = set()
        self.decided: Any = None
        # a line torn by a crash or a full disk is the last one, and is cut off
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock(path)
            self._read(path, identity)
        except BaseException:
            self.close()
            raise
        fsync_folder(path.parent)

    def add_done(self, names: list[str]) -> None:
        """These tensors are on disk: call it after they were synced."""
        self._append({"done": names})
        self.done |= set(names)

    def decide(self, decided: Any) -> None:
        """Keeps something that was computed from the whole model."""
        self._append({"decided": decided})
        self.decided = decided

    def close(self) -> None:
        os.close(self._file)

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out must not be written by another process, got {str(path.parent)!r} in use") from None

    def _read(self, path: Path, identity: str) -> None:
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        lines = [json.loads(line) for line in text[:whole].splitlines()]
        if not lines:
            self._append({"merge": identity})
        elif lines[0] != {"merge": identity}:
            raise ValueError(
                "resume must be of the same recipe, checkpoints and options, "
                f"got {str(path.parent)!r} of another merge: remove it to start over"
            )
        for line in lines[1:]:
            self.done |= set(line.get("done", ()))
            self.decided = line.get("decided", self.decided)

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        while data:  # a disk that is nearly full takes a part
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
