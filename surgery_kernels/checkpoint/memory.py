"""What keeps the memory of a merge bounded, however large the tensors are."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .. import _C
from .writing.durable import reserve

MAPPED_BYTES = 192 << 20  # of files, resident in this process, from which on pages are given back
SECONDS_BETWEEN_LOOKS = 0.005
IN_MEMORY_BYTES = 256 << 20  # of tensors that are not plainly in a file; what is more lies in a temporary one


def memory_bytes() -> int:
    """Of this machine or container: of files that are larger, the beginning is gone when the end was read."""
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    with suppress(OSError, ValueError):  # there is none, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def give_back_pages(mapped: mmap.mmap) -> None:
    """Takes the pages of a shared map out of this process; the next access finds them in the page cache."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def give_back_free_memory() -> None:
    """Takes the memory of tensors that are gone out of this process.

    The C library keeps it in pieces, which are too small for tensors of another size: what is kept grows.
    """
    with suppress(AttributeError, OSError):  # of another library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def given_back(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Views of maps of files whose pages the ops give back themselves: a call may read all of a model.

    Not for any other memory, which would be lost.
    """
    ranges: list[tuple[int, int]] = []
    for begin, nbytes in sorted({(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.nbytes}):
        if ranges and sum(ranges[-1]) == begin:  # neighbours in a file
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + nbytes)
        else:
            ranges.append((begin, nbytes))
    _C.set_mapped(ranges)
    try:
        yield
    finally:
        _C.set_mapped([])


class Buffers:
    """Memory for results, used again when nobody holds the last one: fresh memory takes longer to touch than to merge.

    A tensor from here must be held itself, not only views of it.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        free, self._free = self._free, []
        free.sort(key=lambda buffer: buffer.nbytes)
        # never a much larger one: small results that wait to be written would hold more and more of those
        fitting = [buffer for buffer in free if nbytes <= buffer.nbytes <= 2 * nbytes]
        buffer = fitting[0] if fitting else torch.empty(nbytes, dtype=torch.uint8)
        self._free += [largest for largest in free[-1:] if largest is not buffer]
        tensor = buffer[:nbytes].view(dtype).view(tuple(shape))
        weakref.finalize(tensor, self._give_back, buffer)
        return tensor

    def _give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)


class Scratch:
    """Tensors to be filled: in memory while they are small, else in unnamed files that the system can page out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._in_memory = 0
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._lock = threading.Lock()  # nothing may join the set while another thread goes through it

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        if nbytes == 0 or self._in_memory + nbytes <= IN_MEMORY_BYTES:
            tensor = torch.empty(tuple(shape), dtype=dtype)
            self._in_memory += nbytes
            weakref.finalize(tensor.untyped_storage(), self._returned, nbytes)
            return tensor
        with tempfile.TemporaryFile(dir=self._folder) as file:
            reserve(file.fileno(), nbytes)  # writing to a map past a full disk would kill the process
            mapped = mmap.mmap(file.fileno(), nbytes)
        with self._lock:
            self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    def release(self) -> None:
        """Takes the pages of the files out of this process; they stay in the page cache or go to the disk."""
        with self._lock:
            maps = list(self._maps)
        for mapped in maps:
            give_back_pages(mapped)

    def _returned(self, nbytes: int) -> None:
        self._in_memory -= nbytes


class Releasing:
    """Calls functions that give pages of files back, whenever more than MAPPED_BYTES are resident while the body runs.

    Kernels read whole tensors through memory maps. Pages that they went past would stay with this process, up to the
    size of all inputs; given back, they are still in the page cache, and one that is read again comes from there.
    """

    def __init__(self, releases: Sequence[Callable[[], None]]) -> None:
        self._releases = releases
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="release", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        before = resident_bytes_of_files() or 0  # libraries
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            resident = resident_bytes_of_files()
            if resident is None or resident - before > MAPPED_BYTES:
                for release in self._releases:
                    release()


def resident_bytes_of_files() -> int | None:
    """Of maps of files in this process; None on systems that do not tell."""
    try:
        with open("/proc/self/statm", "rb") as pages:
            return int(pages.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return None
