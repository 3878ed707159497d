"""Peak memory of merging checkpoints, and the memory that results and temporary tensors are made of."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.checkpoint import memory, merge
from surgery_kernels.checkpoint.memory import Buffers, Releasing, Scratch
from tests.checkpoints import save_lora, save_models, ties_recipe, write_zeros

pytestmark = pytest.mark.any_isa

MIB = 1 << 20
NUM_COLUMNS = 4096


def zeros(folder: Path, mebibytes: list[int], num_tasks: int) -> dict[str, Any]:
    """A merge of bfloat16 models with tensors of those sizes, which take no room on the disk."""
    shapes = {f"layers.{i}.weight": (size * MIB // 2 // NUM_COLUMNS, NUM_COLUMNS) for i, size in enumerate(mebibytes)}
    folders = [folder / f"model{i}" for i in range(1 + num_tasks)]
    for path in folders:
        path.mkdir()
        write_zeros(path / "model.safetensors", shapes, torch.bfloat16)
    return ties_recipe(list(map(str, folders)))


def fill(experts: list[str]) -> None:
    """Random numbers in place of their zeros, the same for all: one file on the disk."""
    first, *others = (Path(expert) / "model.safetensors" for expert in experts)
    numbers = torch.randn(4 * MIB, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    noise = numbers.view(torch.int16).numpy().tobytes()
    with open(first, "r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        size = file.seek(0, os.SEEK_END)
        for at in range(begin, size, len(noise)):
            file.seek(at)
            file.write(noise[: size - at])
    for other in others:
        other.unlink()
        other.hardlink_to(first)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("mebibytes", "num_tasks", "keys"),
    [
        ([192, 64, 64], 5, {}),
        ([192, 64, 64], 5, {"scope": "model", "adapter": 192}),
        ([96, 64, 64, 64, 64], 2, {"dtype": "float32", "out_dtype": "bfloat16"}),
    ],
    ids=["by tensor", "by model, an adapter", "casts"],
)
def test_peak(
    run_python: Callable[..., str], tmp_path: Path, mebibytes: list[int], num_tasks: int, keys: dict[str, Any]
) -> None:
    given = zeros(tmp_path, mebibytes, num_tasks)
    if rows := keys.pop("adapter", 0) * MIB // 2 // NUM_COLUMNS:
        factors = {"layers.0": (torch.ones(2, NUM_COLUMNS), torch.ones(rows, 2))}
        given["models"][0]["model"] = str(save_lora(tmp_path / "adapter", factors))
    (tmp_path / "recipe.yml").write_text(json.dumps(given | keys))
    assert (1 + num_tasks) * sum(mebibytes) > 1024  # without an end to it, what is read would pass the limit
    peak = int(run_python("-m", "tests.merge_memory", str(tmp_path / "recipe.yml"), str(tmp_path / "out")))
    shutil.rmtree(tmp_path / "out")
    assert peak < (1024 + 2 * max(mebibytes)) * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_peak_of_one_read(run_python: Callable[..., str], tmp_path: Path) -> None:
    """Of thresholds over the model; what is near them differs from expert to expert, and is kept aside."""
    mebibytes = [192, 64, 64]
    given = zeros(tmp_path, mebibytes, num_tasks=5)
    fill([expert["model"] for expert in given["models"]])
    for expert, density in zip(given["models"], (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        expert["parameters"]["density"] = density
    (tmp_path / "recipe.yml").write_text(json.dumps(given | {"scope": "model"}))
    peak = int(run_python("-m", "tests.merge_memory", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "0"))
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert peak < (1024 + 2 * max(mebibytes)) * MIB


def test_more_files_than_a_process_usually_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole-model thresholds of tensors that are cast: all of them lie in temporary files at once."""
    monkeypatch.setattr(memory, "IN_MEMORY_BYTES", 0)
    models = [{f"layers.{i}.weight": torch.randn(3, 3) for i in range(20)} for _ in range(3)]
    given = ties_recipe(save_models(tmp_path, models), scope="model", dtype="float64", out_dtype="float32")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = (len(os.listdir("/dev/fd")) + 30, limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, few)
    try:
        merge(given, tmp_path / "out")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == few
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def nbytes_held(*tensors: Tensor) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_buffers_are_used_again() -> None:
    buffers = Buffers()
    first = buffers.empty((1000,), torch.float32)
    where = first.data_ptr()
    second = buffers.empty((1000,), torch.float32)
    assert second.data_ptr() != where
    del first
    third = buffers.empty((30, 30), torch.float32)
    assert third.data_ptr() == where and third.shape == (30, 30)
    assert buffers.empty((), torch.float64).shape == () and buffers.empty((0, 3), torch.float64).shape == (0, 3)


def test_results_that_wait_hold_no_larger_buffers() -> None:
    """A large result, and small ones that are not yet written when the next large one is made."""
    buffers, waiting = Buffers(), []
    for _ in range(10):
        large = buffers.empty((1 << 20,), torch.uint8)
        del large
        waiting += [buffers.empty((10,), torch.uint8) for _ in range(3)]
        large = buffers.empty((1 << 20,), torch.uint8)
        waiting.append(buffers.empty((1 << 19,), torch.uint8))
        waiting = waiting[-8:]
        assert nbytes_held(large, *waiting) < 3 << 20
        del large


def test_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory while that is little; beyond it in files, whose pages can be taken away at any time."""
    monkeypatch.setattr(memory, "IN_MEMORY_BYTES", 4096)
    scratch = Scratch(tmp_path)
    small = scratch.empty((512,), torch.float64)
    large = scratch.empty((3, 100, 10), torch.float32)
    large.copy_(torch.arange(3000.0).view(3, 100, 10))
    assert large.shape == (3, 100, 10) and len(scratch._maps) == 1 and list(tmp_path.iterdir()) == []
    scratch.release()
    assert torch.equal(large.view(-1), torch.arange(3000.0))
    part = small[1:2]
    del small, large
    assert len(scratch._maps) == 0
    beyond = scratch.empty((1,), torch.uint8)
    assert len(scratch._maps) == 1
    del part, beyond
    again = scratch.empty((512,), torch.float64)
    assert len(scratch._maps) == 0 and again.shape == (512,)
    assert scratch.empty((0, 4), torch.float32).shape == (0, 4)


def test_release_while_tensors_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(memory, "SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(memory, "MAPPED_BYTES", -math.inf)  # released at every look
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    scratch = Scratch(tmp_path)
    with Releasing([scratch.release]):
        held = [scratch.empty((7,), torch.float64).fill_(i) for i in range(300)]
    sys.setswitchinterval(switching)
    assert [int(x[0]) for x in held] == list(range(300)) and not failures


def test_without_advice_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "IN_MEMORY_BYTES", 0)
    monkeypatch.delattr(memory.mmap, "MADV_DONTNEED", raising=False)
    scratch = Scratch(tmp_path)
    tensor = scratch.empty((7,), torch.float64).fill_(1)
    scratch.release()
    assert torch.equal(tensor, torch.ones(7, dtype=torch.float64))
