"""Files from before torch 1.6, which are no archives: read as views of the file like all others."""

from __future__ import annotations

import pickle
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.reading.legacy_torch_file import Keys, Nothing
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from tests.checkpoints import refused, save_models, state_dict, ties_recipe
from tests.llama_checkpoints import loaded

pytestmark = pytest.mark.any_isa

MIB = 1 << 20


def save_legacy(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    whole = torch.arange(48.0).view(6, 8)
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole[1:3],
        "turned": whole.t(),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(7, 3).bfloat16(),
        "flags": torch.tensor([True, False]),
        "numbers": torch.arange(9),
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    source = open_checkpoint(save_legacy(tmp_path / "pytorch_model.bin", tensors))
    assert source.tied == {"tied": "whole"} and source.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = source.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert info.offset is not None and info.file == tmp_path / "pytorch_model.bin"
        assert torch.equal(source.tensor(name), tensor) and source.tensor(name).is_contiguous()


def test_weights_among_other_things(tmp_path: Path) -> None:
    """Storages of an optimizer lie between those of the model."""
    optimizer = {"state": {0: {"exp_avg": torch.ones(30)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]}
    content = OrderedDict(optimizer=optimizer, state_dict=state_dict(), args=Namespace(lr=1e-3), epoch=3, best=None)
    source = open_checkpoint(save_legacy(tmp_path / "last.ckpt", content))
    for name, tensor in state_dict().items():
        assert torch.equal(source.tensor(name), tensor)


def test_merges_are_those_of_newer_files(tmp_path: Path) -> None:
    folders = save_models(tmp_path, [state_dict(seed) for seed in range(3)])
    merge(ties_recipe(folders), tmp_path / "expected")
    for seed, folder in enumerate(folders):
        (Path(folder) / "model.safetensors").unlink()
        save_legacy(Path(folder) / "pytorch_model.bin", state_dict(seed))
    merge(ties_recipe(folders), tmp_path / "out")
    expected = loaded(tmp_path / "expected")
    for name, tensor in loaded(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name])


class Harmful:
    def __reduce__(self) -> Any:
        return exit, (1,)


def test_what_is_refused(tmp_path: Path) -> None:
    path = save_legacy(tmp_path / "a.bin", {"a": Harmful()})
    refused(path, f"{path} must be a file of tensors by torch.save, got: one that runs ")
    save_legacy(path, {"a": torch.ones(300)})
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, f"{path} must hold the data of 'a', 1200 bytes, got 1000")
    save_legacy(path, {"a": torch.ones(3)})
    claim = path.read_bytes()
    path.write_bytes(claim[:200])
    refused(path, f"{path} must be a file of tensors by torch.save, got: ")
    path.write_bytes(re.sub(rb"(?<=little_endianq.)\x88", b"\x89", claim))
    other = "big" if sys.byteorder == "little" else "little"
    refused(path, f"{path} must be from a {sys.byteorder}-endian machine, got {other!r}")


def test_the_second_look_runs_nothing(tmp_path: Path) -> None:
    """Whatever a pickle names is nothing, and can be called, filled and given a state."""
    content = {
        "harm": Harmful(),
        "state": Namespace(a=[1, {2}]),
        "list": OrderedDict(b=1),
        "numbers": (complex(1, 2), frozenset({3}), bytearray(b"a")),
    }
    with open(tmp_path / "a", "wb") as file:
        pickle.dump(content, file, protocol=2)
    with open(tmp_path / "a", "rb") as file:
        found = Keys(file).load()
    assert isinstance(found["harm"], Nothing) and isinstance(found["state"], Nothing)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_memory(run_python: Callable[..., str], tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.zeros(2048, 4096, dtype=torch.bfloat16) for i in range(6)}
    path = save_legacy(tmp_path / "pytorch_model.bin", tensors)
    assert int(run_python("-m", "tests.read_memory", "released", str(path))) < (16 + 16) * MIB
