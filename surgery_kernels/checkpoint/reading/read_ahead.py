"""Reads ahead of the kernels: brings what they will need from the disk into the page cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

AHEAD_BYTES = 512 << 20
BLOCK_BYTES = 4 << 20
READERS = 4  # blocks in flight: a single one leaves a fast disk idle


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    path: Path
    offset: int
    nbytes: int


class ReadAhead:
    """Goes through groups of spans in order, at most `window` bytes (None: AHEAD_BYTES) past the one last asked for.

    Kernels read the same bytes through memory maps, where a disk error would kill the process: here it is an OSError.
    """

    def __init__(self, groups: Iterable[Sequence[Span]], window: float | None = None) -> None:
        self._window = AHEAD_BYTES if window is None else window
        self._groups = [list(group) for group in groups]
        self._ends: list[int] = []  # bytes up to and with every group
        total = 0
        for group in self._groups:
            total += sum(span.nbytes for span in group)
            self._ends.append(total)
        self._wanted, self._read = 0, -1  # groups
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def wait_for(self, group: int) -> None:
        """Returns when the group's bytes were read.

        Raises:
            OSError: they cannot be.
        """
        with self._change:
            self._wanted = group
            self._change.notify_all()
            self._change.wait_for(lambda: self._read >= group or self._error)
            if self._read < group and self._error:
                raise self._error

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        files: dict[Path, int] = {}
        try:
            with ThreadPoolExecutor(READERS) as readers:
                for number, group in enumerate(self._groups):
                    if not self._may_go_on_to(number):
                        return
                    blocks = []
                    for span in group:
                        if span.path not in files:
                            files[span.path] = os.open(span.path, os.O_RDONLY)
                        end = span.offset + span.nbytes
                        blocks += [
                            (files[span.path], begin, min(BLOCK_BYTES, end - begin), span.path)
                            for begin in range(span.offset, end, BLOCK_BYTES)
                        ]
                    list(readers.map(self._read_block, blocks))
                    with self._change:
                        self._read = number
                        self._change.notify_all()
        except BaseException as error:  # handed to the thread that merges
            with self._change:
                self._error = error
                self._change.notify_all()
        finally:
            for file in files.values():
                os.close(file)

    def _may_go_on_to(self, group: int) -> bool:
        """Waits until it is near enough to what is merged; False: nothing more is wanted."""
        begun = self._ends[group - 1] if group else 0
        with self._change:
            self._change.wait_for(
                lambda: self._stopped or group <= self._wanted or begun - self._ends[self._wanted] < self._window
            )
            return not self._stopped

    def _read_block(self, block: tuple[int, int, int, Path]) -> None:
        if not self._stopped:
            _read(*block)


def _read(file: int, offset: int, nbytes: int, path: Path) -> None:
    if _is_cached(file, offset) and _is_cached(file, offset + nbytes - 1):
        return
    if len(os.pread(file, nbytes, offset)) < nbytes:
        raise OSError(f"{str(path)!r} must not change during the merge, got a shorter file")


def _is_cached(file: int, offset: int) -> bool:
    try:
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (AttributeError, OSError):  # a system or a file system that cannot tell: then it is read
        return False
