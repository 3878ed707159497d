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

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

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
    wrong_format = (
        f"{path} must be complete and in the zip format that torch.save has written since torch 1.6, got another"
    )
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused(tmp_path, wrong_format)
    torch.save({"a": torch.ones(300)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(tmp_path, wrong_format)
    torch.save({"a": Harmful()}, path)
    refused(tmp_path, f"{path} must be a file of tensors by torch.save, got: Weights only load failed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    refused(tmp_path, f"{path} must be a file of tensors by torch.save, got: ")
    torch.save({"a": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    refused(tmp_path, f"{path} must be a file of tensors by torch.save, got: ")
    torch.save([torch.ones(3)], path)
    refused(tmp_path, f"{path} must hold a dict of tensors by name, got list")
    torch.save({"a": torch.ones(3), "step": 5}, path)
    refused(tmp_path, f"{path} must hold a dict of tensors by name, got int for 'step'")
    torch.save({"state_dict": {"a": torch.ones(3)}}, path)
    refused(tmp_path, f"{path} must hold a dict of tensors by name, got dict for 'state_dict'")
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
    refused(tmp_path, f"{path} must be complete and in the zip format")


def test_folders_without_weights(tmp_path: Path) -> None:
    message = (
        "must be a folder with model.safetensors[.index.json], pytorch_model.bin[.index.json] or adapter_config.json"
    )
    refused(tmp_path, f"{tmp_path} {message}, got a folder with nothing", FileNotFoundError)
    (tmp_path / "a.txt").write_text("a")
    refused(tmp_path, f"{tmp_path} {message}, got a folder with a.txt", FileNotFoundError)
    refused(
        tmp_path / "a.txt", f"reference must be a folder or a .safetensors file, got the file '{tmp_path / 'a.txt'}'"
    )


def test_indices_that_do_not_fit(tmp_path: Path) -> None:
    save_safetensors(tmp_path, state_dict(), num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    first, second = (f"model-{i:05}-of-00002.safetensors" for i in (1, 2))
    whole = json.loads(index.read_text())["weight_map"]

    def write(weight_map: object) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({**whole, "other": first})
    refused(tmp_path, f"{tmp_path / first} must hold 'other', which {index.name} lists in it, got no such tensor")
    write({name: shard for name, shard in whole.items() if name != "norm.scale"})
    refused(tmp_path, f"{index} must list 'norm.scale' in {second}, where it is, got it nowhere")
    write({**whole, "other": "model-3.safetensors"})
    refused(tmp_path, f"{tmp_path / 'model-3.safetensors'} must be a file, got none", FileNotFoundError)
    for outside in ("../a.safetensors", "/etc/passwd", "..\\a.safetensors", "a/b.safetensors", "..", 5):
        write({**whole, "other": outside})
        refused(tmp_path, f"{index} must name files of its own folder, got {outside!r}")
    for nothing in ({}, None, ["a"]):
        write(nothing)
        refused(tmp_path, f"{index} must hold a weight_map from names of tensors to files, got {nothing!r}")
    write(whole)
    shard = {name: tensor for name, tensor in state_dict().items() if whole[name] == second}
    save_file({**shard, "embed.weight": torch.ones(3)}, tmp_path / second)
    refused(tmp_path, f"{index} must list 'embed.weight' in {second}, where it is, got it in {first}")
    (tmp_path / "folder.safetensors").mkdir()
    write({**whole, "other": "folder.safetensors"})
    refused(tmp_path, f"{tmp_path / 'folder.safetensors'} must be a file, got a folder", FileNotFoundError)


def test_references_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = "reference must be a path or a model of the Hub that can be had, got 'org/model': no network"
    refused("org/model", message, FileNotFoundError)
    for reference in ("nothing", "./nothing/here", "/nothing", "a/b/c", "org/", "../model"):
        message = f"reference must be a path or a model of the Hub, org/name[@revision], got {reference!r}"
        refused(reference, message, FileNotFoundError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = "huggingface_hub must be installed for a model of the Hub, got no path 'org/model' here and: "
    refused("org/model", message, ImportError)
