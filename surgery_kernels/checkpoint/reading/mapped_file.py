"""Tensors as views of a file."""

from __future__ import annotations

import mmap
import resource
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from ..memory import give_back_pages
from .source import FileStamp, TensorInfo


@contextmanager
def many_files_open() -> Iterator[None]:
    """As many as the system lets this process have: a map holds one, and the usual 1024 are soon too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems call their limit infinite and mean less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class MappedFile:
    """A file mapped into memory when the first tensor is asked for, read-only and shared.

    Such pages are the page cache's own: they take no memory of the process for good, and any of them can be dropped at
    any time, to be read again at the next access.
    """

    def __init__(self, stamp: FileStamp) -> None:
        self._stamp = stamp
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._bytes: Tensor | None = None

    def tensor(self, info: TensorInfo) -> Tensor:
        if 0 in info.shape:
            return torch.empty(info.shape, dtype=info.dtype)
        assert info.offset is not None
        itemsize, strides = info.dtype.itemsize, info.strides
        span = info.nbytes
        if strides is not None:
            span = itemsize * (1 + sum((n - 1) * stride for n, stride in zip(info.shape, strides, strict=True)))
        found = self._opened()[info.offset : info.offset + span]
        if info.offset % itemsize:
            found = found.clone()  # fresh memory is aligned
        elements = found.view(info.dtype)
        if strides is None:
            return elements.view(info.shape)
        return elements.as_strided(info.shape, strides).contiguous()

    def release(self) -> None:
        # no lock: another thread may be waiting for the disk with it
        mapped = self._map
        if mapped is not None:
            give_back_pages(mapped)

    def close(self) -> None:
        # not _map.close(): views may be in use, and the last of them frees it
        self._map = self._bytes = None

    def _opened(self) -> Tensor:
        with self._lock:
            if self._bytes is None:
                with open(self._stamp.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                # after the map was made: what is replaced from here on leaves this one as it is
                if FileStamp.of(self._stamp.path) != self._stamp:
                    self._map = None
                    raise OSError(f"{self._stamp.path} must stay the file that was opened, got a changed one")
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
                    self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
            return self._bytes
