"""What runs beside the kernels: reading ahead, writing behind, and the layout of what is written."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from surgery_kernels.checkpoint.reading import read_ahead
from surgery_kernels.checkpoint.reading.read_ahead import ReadAhead, Span
from surgery_kernels.checkpoint.reading.safetensors_file import DTYPES
from surgery_kernels.checkpoint.writing import writer
from surgery_kernels.checkpoint.writing.journal import Journal
from surgery_kernels.checkpoint.writing.layout import ALIGNMENT, Layout, lay_out
from surgery_kernels.checkpoint.writing.writer import Writer
from tests.cases import assert_same

pytestmark = pytest.mark.any_isa

BLOCK = 100  # bytes read at a time


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 2 * BLOCK)
    monkeypatch.setattr(read_ahead, "_is_cached", lambda *_: False)  # what was just written always is
    path = tmp_path / "weights"
    path.write_bytes(bytes(10 * BLOCK))
    return path


@pytest.fixture
def offsets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was read, in order."""
    seen: list[int] = []
    pread = os.pread

    def reading(file: int, nbytes: int, offset: int) -> bytes:
        seen.append(offset)
        return pread(file, nbytes, offset)

    monkeypatch.setattr(os, "pread", reading)
    return seen


def spans(path: Path) -> list[list[Span]]:
    """Ten groups, the first of two spans; one is of nothing."""
    first = [Span(path, 0, BLOCK // 2), Span(path, BLOCK // 2, BLOCK // 2)]
    return [first, *([Span(path, i * BLOCK, BLOCK)] for i in range(1, 9)), [Span(path, 10 * BLOCK, 0)]]


def settled(values: Callable[[], int], least: int) -> int:
    """The value a while after it is that much."""
    while values() < least:
        time.sleep(0.001)
    time.sleep(0.05)
    return values()


def test_no_further_ahead_than_the_window(path: Path, offsets: list[int]) -> None:
    with ReadAhead(spans(path)) as ahead:
        ahead.wait_for(0)
        # the two groups that begin less than 2 blocks behind the first
        assert settled(lambda: max(offsets), 2 * BLOCK) == 2 * BLOCK
        ahead.wait_for(4)
        assert settled(lambda: max(offsets), 6 * BLOCK) == 6 * BLOCK
        ahead.wait_for(9)
        assert sorted(offsets) == [0, BLOCK // 2, *(i * BLOCK for i in range(1, 9))]


def test_a_group_larger_than_the_window(path: Path, offsets: list[int]) -> None:
    with ReadAhead([[Span(path, 0, 10 * BLOCK)], [Span(path, 0, BLOCK)]]) as ahead:
        ahead.wait_for(1)
    assert len(offsets) == 11


def test_what_is_cached_is_not_read(path: Path, offsets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_is_cached", lambda *_: True)
    with ReadAhead(spans(path)) as ahead:
        ahead.wait_for(9)
    assert offsets == []


def test_systems_that_cannot_tell_what_is_cached(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    with ReadAhead(spans(path)) as ahead:
        ahead.wait_for(9)


def test_a_shorter_file(path: Path) -> None:
    os.truncate(path, 5 * BLOCK + 1)
    with ReadAhead(spans(path)) as ahead:
        ahead.wait_for(4)
        with pytest.raises(OSError, match=f"^'{path}' must not change during the merge, got a shorter file$"):
            ahead.wait_for(5)


def test_a_file_that_is_gone(path: Path) -> None:
    groups = [*spans(path)[:2], [Span(path.with_name("gone"), 0, 1)]]
    with ReadAhead(groups) as ahead:
        ahead.wait_for(1)  # what was read before counts
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="gone"):
                ahead.wait_for(2)


def test_a_disk_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    with ReadAhead(spans(path)) as ahead, pytest.raises(OSError, match="Input/output error"):
        ahead.wait_for(0)


def test_leaving_early(path: Path, offsets: list[int]) -> None:
    files = len(os.listdir("/dev/fd"))
    threads = threading.active_count()
    for _ in range(3):
        with ReadAhead(spans(path)) as ahead:
            ahead.wait_for(0)
    with ReadAhead([]):
        pass
    assert max(offsets) <= 2 * BLOCK
    assert threading.active_count() == threads and len(os.listdir("/dev/fd")) == files


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {f"t{i}": torch.randn(3 + i, 5) for i in range(6)}


@pytest.fixture
def layout(tensors: dict[str, Tensor]) -> Layout:
    return lay_out({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}, 300)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal", "merge")


def done(tmp_path: Path) -> list[str]:
    lines = map(json.loads, (tmp_path / "journal").read_text().splitlines())
    return [name for line in lines for name in line.get("done", ())]


def test_writes(tmp_path: Path, tensors: dict[str, Tensor], layout: Layout, journal: Journal) -> None:
    assert len(layout.shards) > 2
    writing = Writer(tmp_path, layout, journal)
    for name, tensor in tensors.items():
        writing.wait_for_room()
        writing.write(name, tensor)
    writing.close(complete=True)
    for number, shard in enumerate(layout.shards):
        loaded = load_file(tmp_path / shard.file)
        assert loaded.keys() == {name for name, place in layout.places.items() if place.shard == number}
        for name in loaded:
            assert_same(loaded[name], tensors[name], name)
    assert done(tmp_path) == list(tensors)


def test_stops_as_soon_as_may_be(
    tmp_path: Path, tensors: dict[str, Tensor], layout: Layout, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits to be written is dropped; what was written counts."""
    writing = Writer(tmp_path, layout, journal)
    begun, may_go_on = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(*arguments: object) -> int:
        begun.set()
        may_go_on.wait()
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    for name in ("t0", "t1", "t2"):
        writing.write(name, tensors[name])
    begun.wait()
    closing = threading.Thread(target=lambda: writing.close(complete=False))
    closing.start()
    while len(writing._queue) != 1:
        time.sleep(0.001)
    may_go_on.set()
    closing.join()
    assert done(tmp_path) == ["t0"]


def test_room(
    tmp_path: Path, tensors: dict[str, Tensor], layout: Layout, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PENDING_BYTES", 0)
    writing = Writer(tmp_path, layout, journal)
    pwrite, may_go_on, has_room = os.pwrite, threading.Event(), threading.Event()
    monkeypatch.setattr(os, "pwrite", lambda *arguments: may_go_on.wait() and pwrite(*arguments))
    writing.write("t0", tensors["t0"])
    waiting = threading.Thread(target=lambda: (writing.wait_for_room(), has_room.set()))
    waiting.start()
    assert not has_room.wait(0.05)
    may_go_on.set()
    waiting.join()
    writing.close(complete=True)


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_an_error_of_the_disk(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    layout: Layout,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    monkeypatch.setattr(writer, "PENDING_BYTES", 0)
    writing = Writer(tmp_path, layout, journal)
    writing.write("t0", tensors["t0"])
    while not done(tmp_path):
        time.sleep(0.001)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        writing.write("t1", tensors["t1"])
        with pytest.raises(OSError, match="Input/output error"):
            while True:
                writing.wait_for_room()
    with pytest.raises(OSError, match="Input/output error"):
        writing.write("t2", tensors["t2"])
    with pytest.raises(OSError, match="Input/output error"):
        writing.close(complete=True)
    assert done(tmp_path) == ["t0"] and len(os.listdir("/dev/fd")) == files


def test_no_file_stays_open_when_shards_cannot_be_made(
    tmp_path: Path, layout: Layout, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / layout.shards[-1].file).mkdir()
    files = len(os.listdir("/dev/fd"))
    with pytest.raises(IsADirectoryError):
        Writer(tmp_path, layout, journal)
    assert len(os.listdir("/dev/fd")) == files


NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
MODELS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES), min_size=1, max_size=8)


@given(MODELS, st.integers(1, 400))
def test_layouts_are_read_back(tmp_path_factory: pytest.TempPathFactory, model: dict, max_shard_bytes: int) -> None:
    layout = lay_out(model, max_shard_bytes)
    assert list(layout.places) == list(model)
    folder = tmp_path_factory.mktemp("model")
    for number, shard in enumerate(layout.shards):
        names = [name for name, place in layout.places.items() if place.shard == number]
        content = bytearray(shard.header + bytes(shard.nbytes - len(shard.header)))
        for name in names:
            place = layout.places[name]
            assert place.offset % place.dtype.itemsize == 0
            content[place.offset : place.offset + place.nbytes] = bytes([1 + names.index(name)]) * place.nbytes
        assert len(content) == shard.nbytes and len(shard.header) % ALIGNMENT == 0
        assert len(names) == 1 or sum(layout.places[name].nbytes for name in names) <= max_shard_bytes
        (folder / shard.file).write_bytes(content)
        with safe_open(folder / shard.file, framework="pt") as file:
            assert set(file.keys()) == set(names) and file.metadata() == {"format": "pt"}
            for name in names:
                found = file.get_tensor(name)
                assert found.dtype == model[name][0] and tuple(found.shape) == model[name][1]
                assert (
                    bytes(found.reshape(-1).view(torch.uint8).tolist()) == bytes([1 + names.index(name)]) * found.nbytes
                )
    indices = {file: json.loads(text) for file, text in layout.indices().items()}
    weight_map = {name: layout.shards[place.shard].file for name, place in layout.places.items()}
    total = {"total_size": sum(place.nbytes for place in layout.places.values())}
    whole = {"metadata": total, "weight_map": weight_map}
    assert indices == ({"model.safetensors.index.json": whole} if len(layout.shards) > 1 else {})
    assert len({shard.file for shard in layout.shards}) == len(layout.shards)
