"""How long a merge will take, from a short look at the disks."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from .plan import Plan

PROBE_BYTES = 64 << 20


def estimate_seconds(plan: Plan, out: str | os.PathLike[str]) -> float:
    """Seconds for the reading and the writing of a plan, at the rates of a short read and a short write.

    Reads the beginning of the largest input and writes a temporary file of 64 MiB where `out` will be. Files that are
    in the page cache read fast here and in the merge.
    """
    largest = max((file for source in plan.sources.values() for file in source.files), key=lambda file: file.size)
    read, written = min(PROBE_BYTES, largest.size), min(PROBE_BYTES, plan.layout.nbytes)
    reading = _seconds_to_read(largest.path, read) / read
    folder = next(folder for folder in Path(os.path.abspath(out)).parents if folder.is_dir())
    writing = _seconds_to_write(folder, written) / written
    return reading * plan.nbytes_read + writing * plan.layout.nbytes


def _seconds_to_read(path: Path, nbytes: int) -> float:
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while nbytes > 0 and (data := file.read(min(nbytes, 1 << 20))):
            nbytes -= len(data)
    return time.perf_counter() - start


def _seconds_to_write(folder: Path, nbytes: int) -> float:
    block = bytes(1 << 20)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for begin in range(0, nbytes, len(block)):
            file.write(block[: nbytes - begin])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start
