"""Writes behind the kernels: tensors go to their places in the shards while the next ones are merged."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from .durable import fsync_folder, make_folders, reserve
from .journal import Journal
from .layout import Layout, Place

PENDING_BYTES = 128 << 20  # merged, not yet written: from here on the next merge waits
PIECE = 1 << 18  # elements written at a time where they are looked at: they are still in the cache
SYNC_BYTES = 64 << 20  # written between two syncs: the disk is busy from early on, and a crash costs little


# Sees a part of a flat tensor, from where to where, before it is written, and may change it or raise.
Look = Callable[[Tensor, int, int], None]


@dataclass(frozen=True)
class Entries:
    """Some entries of a tensor that was written."""

    positions: Tensor  # int64 [count], in the flat tensor
    values: Tensor  # [count]


@dataclass(frozen=True)
class _Item:
    """What the thread is to do for a tensor."""

    name: str
    content: Tensor | Entries
    look: Look | None
    is_final: bool = True

    @property
    def nbytes(self) -> int:
        content = self.content
        return content.nbytes if isinstance(content, Tensor) else content.positions.nbytes + content.values.nbytes


class Writer:
    """One thread that writes tensors into preallocated shards and tells the journal once they are on disk."""

    def __init__(self, folder: Path, layout: Layout, journal: Journal, hashes: dict[str, str] | None = None) -> None:
        """Makes the shards in full, so that a disk that is too small is found out now.

        hashes: Is told the XXH3 of every tensor that was written in one piece.

        Raises:
            OSError: they cannot be made, or one with tensors that the journal calls done is not there any more.
        """
        self._layout, self._journal = layout, journal
        self._hashes: dict[str, str] = {} if hashes is None else hashes
        self._queue: deque[_Item | threading.Event | None] = deque()
        self._pending = 0  # bytes handed over, not yet written
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._files: list[int] = []
        try:
            for number, shard in enumerate(layout.shards):
                self._check_kept(folder / shard.file, number)
                make_folders(folder, shard.file)
                self._files.append(os.open(folder / shard.file, os.O_RDWR | os.O_CREAT, 0o644))
                reserve(self._files[-1], shard.nbytes)
                _write_at(self._files[-1], memoryview(shard.header), 0)
            for parent in {(folder / shard.file).parent for shard in layout.shards}:
                fsync_folder(parent)  # the journal must not know more than the disk
        except BaseException:
            self._close_files()
            raise
        self._thread = threading.Thread(target=self._run, name="writer")
        self._thread.start()

    def wait_for_room(self) -> None:
        """Returns when little is left to be written, before memory for another result is taken.

        Raises:
            OSError: an earlier tensor could not be written.
        """
        with self._change:
            self._change.wait_for(lambda: self._pending <= PENDING_BYTES or self._error)
            self._check()

    def write(self, name: str, tensor: Tensor, look: Look | None = None) -> None:
        """Takes a contiguous tensor on the CPU, which must not change any more but by `look`."""
        self._take(_Item(name, tensor, look))

    def draft(self, name: str, tensor: Tensor) -> None:
        """The same for a tensor that is not done before it is amended."""
        self._take(_Item(name, tensor, None, is_final=False))

    def amend(self, name: str, entries: Entries, look: Look | None = None) -> None:
        """Changes entries of a tensor that was drafted; `look` sees all of it."""
        self._take(_Item(name, entries, look))

    def wait_until_written(self) -> None:
        """Returns when all that was handed over is on disk, and the journal knows.

        Raises:
            OSError: something could not be written.
        """
        written = threading.Event()
        with self._change:
            self._check()
            self._queue.append(written)
            self._change.notify_all()
            self._change.wait_for(lambda: written.is_set() or self._error)
            self._check()

    def close(self, *, complete: bool) -> None:
        """Ends the thread: after everything is written and on disk, or (not complete) as soon as may be.

        Raises:
            OSError: something could not be written, if it was to be complete.
        """
        with self._change:
            if not complete:
                self._queue.clear()
            self._queue.append(None)
            self._change.notify_all()
        self._thread.join()
        self._close_files()
        if complete:
            self._check()

    def _take(self, item: _Item) -> None:
        with self._change:
            self._check()
            self._queue.append(item)
            self._pending += item.nbytes
            self._change.notify_all()

    def _check_kept(self, path: Path, shard: int) -> None:
        nbytes = self._layout.shards[shard].nbytes
        got = path.stat().st_size if path.exists() else 0
        if got != nbytes and any(self._layout.places[name].shard == shard for name in self._journal.done):
            raise OSError(
                f"{path} must be as the earlier merge left it, {nbytes} bytes, got {got}: "
                f"remove {str(path.parent.parent)!r} to start over"
            )

    def _run(self) -> None:
        written: list[str] = []
        unsynced = 0
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._queue)
                    item = self._queue.popleft()
                if item is None:
                    self._sync(written)
                    return
                if isinstance(item, threading.Event):
                    self._sync(written)
                    written, unsynced = [], 0
                    with self._change:
                        item.set()
                        self._change.notify_all()
                    continue
                place, nbytes = self._layout.places[item.name], item.nbytes
                self._put(item, place)
                if item.is_final:
                    written.append(item.name)
                    unsynced += place.nbytes
                del item  # its memory is free before anybody hears of it
                with self._change:
                    self._pending -= nbytes
                    self._change.notify_all()
                if unsynced >= SYNC_BYTES:
                    self._sync(written)
                    written, unsynced = [], 0
        except BaseException as error:  # handed to the thread that merges
            with self._change:
                self._error = error
                self._change.notify_all()

    def _put(self, item: _Item, place: Place) -> None:
        content, look = item.content, item.look
        if isinstance(content, Entries):
            tensor = self._read(place)
            tensor[content.positions] = content.values
        else:
            tensor = content
        file, flat, size = self._files[place.shard], tensor.reshape(-1), tensor.dtype.itemsize
        in_one_piece = place.strides is None and item.is_final
        hashed = xxhash.xxh3_64()
        for begin in range(0, len(flat), PIECE if look else len(flat) or 1):
            end = min(begin + PIECE, len(flat)) if look else len(flat)
            if look:
                look(flat, begin, end)
            if place.strides is None:
                data = _bytes_of(flat[begin:end])
                _write_at(file, data, place.offset + begin * size)
                if in_one_piece:
                    hashed.update(data)
        if place.strides is not None:
            _write_between(file, flat.view(place.shape), place.strides, place.offset)
        if in_one_piece:
            self._hashes[item.name] = hashed.hexdigest()

    def _read(self, place: Place) -> Tensor:
        """What was written, flat."""
        tensor = torch.empty(place.nbytes // place.dtype.itemsize, dtype=place.dtype)
        data, offset = _bytes_of(tensor), place.offset
        while data:
            count = os.preadv(self._files[place.shard], [data], offset)
            if not count:
                raise OSError("the result must not change during the merge, got a shorter file")
            data, offset = data[count:], offset + count
        return tensor

    def _sync(self, names: list[str]) -> None:
        for shard in sorted({self._layout.places[name].shard for name in names}):
            os.fsync(self._files[shard])
        if names:
            self._journal.add_done(names)

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write_between(file: int, tensor: Tensor, strides: tuple[int, ...], offset: int) -> None:
    """Writes among other elements, a few rows of the file at a time: they are read, and written back."""
    by_row = tensor.T if tensor.ndim == 2 else tensor[None]  # [inputs, outputs]; one row of a bias
    step, pitch = strides if tensor.ndim == 2 else (*strides, tensor.numel() * strides[0])
    itemsize, num_rows = tensor.dtype.itemsize, max(1, PIECE // pitch)
    for begin in range(0, len(by_row), num_rows):
        rows = by_row[begin : begin + num_rows]
        length = ((len(rows) - 1) * pitch + (rows.shape[1] - 1) * step + 1) * itemsize
        at = offset + begin * pitch * itemsize
        there = torch.frombuffer(bytearray(_read_at(file, length, at)), dtype=tensor.dtype)
        there.as_strided(rows.shape, (pitch, step)).copy_(rows)
        _write_at(file, _bytes_of(there), at)


def _read_at(file: int, length: int, offset: int) -> bytes:
    read = b""
    while len(read) < length:
        if not (more := os.pread(file, length - len(read), offset + len(read))):
            raise OSError(f"a shard must be {offset + length} bytes long, got {offset + len(read)}")
        read += more
    return read


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count
