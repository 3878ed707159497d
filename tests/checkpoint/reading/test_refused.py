"""Checkpoints that are refused: what is damaged, changed, harmful or missing."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from tests.checkpoints import refused, save_safetensors, state_dict, write_safetensors

pytestmark = pytest.mark.any_isa


def test_changed_files(tmp_path: Path) -> None:
    folder = save_safetensors(tmp_path, state_dict())
    source = open_checkpoint(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    message = f"{folder / 'model.safetensors'} must stay the file that was opened, got a changed one"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        source.tensor("norm.scale")


def test_truncated_files(tmp_path: Path) -> None:
    path = save_safetensors(tmp_path, state_dict()) / "model.safetensors"
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100):
        path.write_bytes(content[:size])
        refused(tmp_path, f"{path} must be complete, got {size} bytes of ")
    path.write_bytes(content[:-1])
    refused(path, f"{path} must be complete, got {len(content) - 1} bytes of {len(content)}")
    path.write_bytes(content[:5])
    refused(path, f"{path} must be a safetensors file, got: ")


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    refused(path, f"{path} must hold weights, got an empty file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(path, f"{path} must hold weights, got a git-lfs pointer to them: run `git lfs pull` in its folder")
    path.write_bytes(b"PK" * 40)
    refused(path, f"{path} must be a safetensors file, got: ")
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    refused(write_safetensors(path, {"a": {**entry, "shape": [2]}}, 4), f"{path} must be a safetensors file, got: ")
    refused(write_safetensors(path, {"a": entry}, 8), f"{path} must be a safetensors file, got: ")
    refused(write_safetensors(path, {"a": [1]}, 8), f"{path} must be a safetensors file, got: ")
    refused(write_safetensors(path, "{]", 8), f"{path} must be a safetensors file, got: ")
    overlapping = {"a": entry, "b": {**entry, "data_offsets": [2, 6]}}
    refused(write_safetensors(path, overlapping, 6), f"{path} must be a safetensors file, got: ")
    twice = f'{{"a": {json.dumps(entry)}, "a": {json.dumps(entry)}}}'
    refused(write_safetensors(path, twice, 4), f"{path} must name every tensor once, got 'a' twice")


def test_dtypes_that_torch_has_not(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, 4)
    refused(path, f"{path} must hold tensors of dtypes that torch has, got F4 for 'a'")


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def test_what_is_no_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    wrong_format = f"{path} must be complete and in a format of torch.save, got another: load it and save it again"
    torch.save({"a": torch.ones(300)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(tmp_path, wrong_format)
    torch.save({"a": Harmful()}, path)
    refused(
        tmp_path,
        f"{path} must be a file of tensors by torch.save, got: one that runs posix.system: where you trust it, load it "
        "and save its state dict as safetensors",
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    refused(tmp_path, f"{path} must be a file of tensors by torch.save, got: ")
    torch.save({"a": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    refused(tmp_path, f"{path} must be a file of tensors by torch.save, got: ")
    torch.save([torch.ones(3)], path)
    refused(tmp_path, f"{path} must hold a dict of tensors by name, got list")
    for content, found in (
        ({}, "none"),
        ({"step": 5, "optimizer": {"a": torch.ones(3)}}, "none"),
        ({"params": {"a": torch.ones(3)}, "params_ema": {"a": torch.ones(3)}}, "'params', 'params_ema'"),
        ({"student": {"a": torch.ones(3)}}, "'student'"),
        ({"model": {"a": torch.ones(3)}, "mean": torch.ones(3)}, "'model', 'mean'"),
        ({"model": {"a": torch.ones(3), "deep": [torch.ones(3)]}}, "'deep', 'a'"),
    ):
        torch.save(content, path)
        message = (
            "must hold one dict of tensors by name, itself or as its state_dict, model_state_dict, model, module, ..."
        )
        way_on = "save the one that you mean with torch.save"
        refused(tmp_path, f"{path} {message}, got tensors in {found}: {way_on}")
    torch.save({5: torch.ones(3)}, path)
    refused(tmp_path, f"{path} must hold tensors by name, got the name 5")
    torch.save({"a": torch.ones(3).to_sparse()}, path)
    refused(tmp_path, f"{path} must hold dense tensors, got another layout for 'a'")


def repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, change(name, data))


def test_archives_that_are_not_what_torch_writes(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(300)}, path)
    repacked(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(tmp_path, f"{path} must be an archive without compression, got 'pytorch_model/data.pkl' compressed")
    torch.save({"a": torch.ones(300)}, path)
    other = "big" if sys.byteorder == "little" else "little"
    repacked(path, lambda name, data: other.encode() if name.endswith("byteorder") else data)
    refused(tmp_path, f"{path} must be from a {sys.byteorder}-endian machine, got {other!r}")
    torch.save({"a": torch.ones(300)}, path)
    repacked(path, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    refused(tmp_path, f"{path} must hold the data of 'a', 1200 bytes, got ")


def test_a_pickle_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(7)}, path)
    # K and a byte: how the pickle writes the number of elements, of the storage and of the tensor
    repacked(path, lambda name, data: data.replace(b"K\x07", b"K\xfa") if name.endswith(".pkl") else data)
    refused(tmp_path, f"{path} must hold the data of 'a', 1000 bytes, got 28")


def test_pickle_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path, f"{path} must be complete and in a format of torch.save, got another")


def test_folders_without_weights(tmp_path: Path) -> None:
    message = (
        "must be a folder with model.safetensors[.index.json], pytorch_model.bin[.index.json], model_index.json, other "
        "weights or adapter_config.json"
    )
    for name, found in {
        "": "a folder with nothing",
        "a.txt": "a folder with a.txt",
        "training_args.bin": "a folder with a.txt, training_args.bin",
        "b/model.safetensors": "a folder with models in b: name one of those",
        "tf_model.h5": "a TensorFlow model: load it with transformers 4, from_tf=True, and save it",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name:
            (tmp_path / name).write_text("a")
        refused(tmp_path, f"{tmp_path} {message}, got {found}", FileNotFoundError)
    way_on = "must be a folder, an index or a file of weights (.safetensors, .bin, .pt, .pth, .ckpt)"
    refused(tmp_path / "a.txt", f"reference {way_on}, got '{tmp_path / 'a.txt'}'")


def test_indices_that_do_not_fit(tmp_path: Path) -> None:
    save_safetensors(tmp_path, state_dict(), num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    first = "model-00001-of-00002.safetensors"
    whole = json.loads(index.read_text())["weight_map"]

    def write(weight_map: object) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({**whole, "other": first})
    refused(tmp_path, f"{tmp_path / first} must hold 'other', which {index.name} lists in it, got no such tensor")
    write({**whole, "other": "model-3.safetensors"})
    refused(tmp_path, f"{tmp_path / 'model-3.safetensors'} must be a file, got none", FileNotFoundError)
    for outside in ("../a.safetensors", "/etc/passwd", "..\\a.safetensors", "a/b.safetensors", "..", 5):
        write({**whole, "other": outside})
        refused(tmp_path, f"{index} must name files of its own folder, got {outside!r}")
    for nothing in ({}, None, ["a"]):
        write(nothing)
        refused(tmp_path, f"{index} must hold a weight_map from names of tensors to files, got {nothing!r}")
    write(whole)
    (tmp_path / "folder.safetensors").mkdir()
    write({**whole, "other": "folder.safetensors"})
    refused(tmp_path, f"{tmp_path / 'folder.safetensors'} must be a file, got a folder", FileNotFoundError)
