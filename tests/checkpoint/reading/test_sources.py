"""Checkpoints as a merge reads them: layouts, views and memory."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery_kernels.checkpoint.reading import torch_file
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.checkpoint.reading.safetensors_file import DTYPES
from surgery_kernels.checkpoint.reading.source import FileStamp
from tests.checkpoints import (
    refused,
    save_lora,
    save_safetensors,
    save_torch,
    state_dict,
    write_safetensors,
    write_zeros,
)

pytestmark = pytest.mark.any_isa

RunPython = Callable[..., str]
MIB = 1 << 20


def check_same(reference: Path, expected: dict[str, Tensor]) -> None:
    source = open_checkpoint(reference)
    assert source.tensors.keys() == expected.keys()
    assert source.changed == expected.keys()
    for name, tensor in expected.items():
        info, found = source.tensors[name], source.tensor(name)
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.is_contiguous()
        assert torch.equal(found, tensor)
    source.release()
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in expected.items())
    source.close()


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("save", [save_safetensors, save_torch])
def test_every_layout(tmp_path: Path, save: Callable[..., Path], num_shards: int) -> None:
    tensors = state_dict()
    folder = save(tmp_path, tensors, num_shards=num_shards, config={"model_type": "small"})
    check_same(folder, tensors)
    source = open_checkpoint(str(folder))
    assert source.name == str(folder) and source.folder == folder and source.config == {"model_type": "small"}
    weights = [file for file in source.files if file.path.suffix != ".json"]
    assert len(weights) == num_shards and len(source.files) == num_shards + (num_shards > 1)
    assert all(file == FileStamp.of(file.path) and file.size == file.path.stat().st_size for file in source.files)


@pytest.mark.parametrize("end", [".safetensors", ".bin", ".pt", ".pth", ".ckpt"])
def test_a_file(tmp_path: Path, end: str) -> None:
    save = save_file if end == ".safetensors" else torch.save
    tensors = state_dict(dtype=torch.bfloat16)
    path = tmp_path / f"expert{end}"
    save(tensors, path)
    check_same(path, tensors)
    source = open_checkpoint(path)
    assert source.folder is None and source.config is None and source.tied == {}
    (tmp_path / "config.json").write_text('{"model_type": "small"}')
    source = open_checkpoint(path)
    assert source.folder == tmp_path and source.config == {"model_type": "small"}


def test_safetensors_come_first(tmp_path: Path) -> None:
    save_torch(tmp_path, {"a": torch.zeros(3)})
    check_same(save_safetensors(tmp_path, state_dict()), state_dict())


def test_every_dtype(tmp_path: Path) -> None:
    header, end = {}, 0
    for dtype, of_torch in DTYPES.items():
        header[dtype] = {"dtype": dtype, "shape": [2, 1], "data_offsets": [end, end + 2 * of_torch.itemsize]}
        end += 2 * of_torch.itemsize
    source = open_checkpoint(write_safetensors(tmp_path / "all.safetensors", header, end))
    for dtype, of_torch in DTYPES.items():
        assert source.tensors[dtype].dtype == source.tensor(dtype).dtype == of_torch
        assert source.tensor(dtype).shape == (2, 1)


@pytest.mark.parametrize("save", [save_safetensors, save_torch])
def test_order_of_the_file(tmp_path: Path, save: Callable[..., Path]) -> None:
    tensors = {name: torch.full((5,), float(i)) for i, name in enumerate("cadb")}
    source = open_checkpoint(save(tmp_path, tensors))
    offsets = [info.offset for info in source.tensors.values()]
    assert offsets == sorted(offsets)
    for name, info in source.tensors.items():
        data = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=info.dtype), tensors[name])


def test_views_of_the_file(tmp_path: Path) -> None:
    source = open_checkpoint(save_safetensors(tmp_path, state_dict()))
    first, again = source.tensor("embed.weight"), source.tensor("embed.weight")
    assert first.data_ptr() == again.data_ptr()
    source.close()
    assert torch.equal(first, state_dict()["embed.weight"])


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    header = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [1, 17]},
    }
    path = write_safetensors(tmp_path / "a.safetensors", header, 17)
    values = torch.arange(4.0)
    path.write_bytes(path.read_bytes()[:-16] + values.numpy().tobytes())
    weight = open_checkpoint(path).tensor("weight")
    assert torch.equal(weight, values.view(2, 2)) and weight.data_ptr() % 16 == 0


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = {"none": torch.empty(0, 4), "also": torch.empty(0, 4), "one": torch.tensor(3.0)}
    for save in (save_safetensors, save_torch):
        source = open_checkpoint(save(tmp_path / save.__name__, tensors))
        assert source.tensor("none").shape == (0, 4) and source.tensor("one").item() == 3
        assert source.tied == {}


def test_torch_layouts(tmp_path: Path) -> None:
    whole = torch.arange(48.0).view(6, 8)
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole[1:3],
        "columns": whole[:, 2:5],
        "turned": whole.t(),
        "one": whole[0, 0].expand(3, 2),
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
    }
    source = open_checkpoint(save_torch(tmp_path, tensors))
    assert source.tied == {"tied": "whole"}
    assert source.tensor("rows").data_ptr() == source.tensor("whole").data_ptr() + 32
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor) and source.tensor(name).is_contiguous()
        assert source.tensors[name].nbytes == tensor.nbytes and not source.tensor(name).requires_grad


STEP = {"epoch": 3, "loss": torch.tensor(0.5), "args": Namespace(lr=1e-3), "names": ["a"], "best": None, "note": "x"}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tensors: {**tensors, "global_step": 7, "version": "1", "extra": {"a": [1, None]}},
        lambda tensors: {"state_dict": tensors, "optimizer_states": [OPTIMIZER], "lr_schedulers": [], **STEP},
        lambda tensors: {"model": tensors, "optimizer": OPTIMIZER, "scaler": {"a": torch.ones(2)}, **STEP},
        lambda tensors: {"module": tensors, "lr_scheduler": OPTIMIZER, "rng_state": torch.ones(9)},
        lambda tensors: {"params_ema": tensors},
        lambda tensors: {"ema": {"module": OrderedDict(tensors), "updates": 5}},
        lambda tensors: {"model": {"state_dict": tensors}, "callbacks": {"best": {"score": torch.ones(1)}}},
    ],
)
def test_what_torch_files_hold_in_the_wild(tmp_path: Path, wrapped: Callable[[dict[str, Tensor]], object]) -> None:
    torch.save(wrapped(state_dict()), tmp_path / "last.ckpt")
    check_same(tmp_path / "last.ckpt", state_dict())


def test_torch_files_of_other_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    check_same(save_torch(tmp_path, state_dict()), state_dict())


def test_models_beside_adapters(tmp_path: Path) -> None:
    save_safetensors(save_lora(tmp_path, {}, {"a": torch.ones(1)}), state_dict())
    refused(tmp_path, f"{tmp_path} must be a folder with a model or an adapter, got both: name the file of the model")


def test_configurations(tmp_path: Path) -> None:
    save_safetensors(tmp_path, state_dict())
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, f"{tmp_path / 'config.json'} must be a JSON file, got: ")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\xfa")
    refused(tmp_path, f"{tmp_path / 'config.json'} must be a JSON file, got: ")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, f"{tmp_path / 'config.json'} must hold a JSON object, got list")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "zeros.safetensors"
    return write_zeros(path, {f"layers.{i}.weight": (4096, 4096) for i in range(16)}, torch.bfloat16)  # 512 MiB


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")


@on_linux
def test_memory(run_python: RunPython, large: Path) -> None:
    assert int(run_python("-m", "tests.read_memory", "released", str(large))) < (32 + 16) * MIB
    assert int(run_python("-m", "tests.read_memory", "all_kept", str(large))) > 0.9 * 512 * MIB


@on_linux
def test_memory_while_others_release(run_python: RunPython, tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "zeros.safetensors", {"weight": (8192, 16384)}, torch.bfloat16)  # 256 MiB
    assert int(run_python("-m", "tests.read_memory", "watched", str(path))) < 128 * MIB


@on_linux
def test_memory_of_torch_files(run_python: RunPython, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.zeros(2048, 4096, dtype=torch.bfloat16) for i in range(6)}
    folder = save_torch(tmp_path, tensors)
    assert int(run_python("-m", "tests.read_memory", "released", str(folder))) < (16 + 16) * MIB


@on_linux
def test_opening_maps_nothing(tmp_path: Path, large: Path) -> None:
    source = open_checkpoint(large)
    source.release()
    assert str(large) not in Path("/proc/self/maps").read_text()
    source.tensor("layers.3.weight")
    [mapped] = (line for line in Path("/proc/self/maps").read_text().splitlines() if str(large) in line)
    assert mapped.split()[1] == "r--s"
    source.close()
    assert str(large) not in Path("/proc/self/maps").read_text()


def test_offsets_come_from_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch that no longer tells them is noticed."""
    folder = save_torch(tmp_path, state_dict())
    load = torch.load

    def forgetful(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        entries = load(*arguments, **options)
        for tensor in entries.values():
            del tensor.untyped_storage()._checkpoint_offset
        return entries

    monkeypatch.setattr(torch_file.torch, "load", forgetful)
    with pytest.raises(ValueError, match=r"must hold the data of 'embed.weight', 264 bytes, got 0$"):
        open_checkpoint(folder)
