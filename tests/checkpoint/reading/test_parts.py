"""Which files of a folder are its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from tests.checkpoints import refused

pytestmark = pytest.mark.any_isa


def write(folder: Path, *files: str) -> None:
    """Each with one tensor, the name of which is that of the file."""
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        save = save_file if file.endswith(".safetensors") else torch.save
        save({file: torch.ones(2)}, folder / file)


def write_index(folder: Path, index: str, *files: str) -> None:
    (folder / index).write_text(json.dumps({"weight_map": {file: file for file in files}}))


# What lies in a folder, the better first, and what the files of the result are called.
ORDER = {
    "model.safetensors": "model",
    "pytorch_model.bin": "model",
    "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model",
    "diffusion_pytorch_model.bin": "diffusion_pytorch_model",
    "open_clip_model.safetensors": "open_clip_model",
    "open_clip_pytorch_model.bin": "open_clip_model",
    "consolidated.safetensors": "consolidated",
    "consolidated.00.pth": "consolidated",
    "model.fp16.safetensors": "model",
    "weights-of-mine.safetensors": "model",
    "weights-of-mine.pt": "model",
}


def test_the_better_file_counts(tmp_path: Path) -> None:
    write(tmp_path, "training_args.bin", "optimizer.pt", "rng_state_0.pth")
    for file, stem in reversed(ORDER.items()):
        write(tmp_path, file)
        source = open_checkpoint(tmp_path)
        assert source.tensors.keys() == {file} and source.anatomy.stems == {"": stem}
        assert open_checkpoint(tmp_path / file).anatomy.stems == {"": stem}


@pytest.mark.parametrize(
    ("index", "stem"),
    [
        ("model.safetensors.index.json", "model"),
        ("model.safetensors.index.fp16.json", "model"),
        ("diffusion_pytorch_model.safetensors.index.non_ema.json", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model"),
        ("consolidated.safetensors.index.json", "consolidated"),
        ("pytorch_model.bin.index.json", "model"),
        ("mine.safetensors.index.json", "model"),
    ],
)
def test_an_index_names_its_shards(tmp_path: Path, index: str, stem: str) -> None:
    end = ".bin" if ".bin" in index else ".safetensors"
    shards = [f"a{end}", f"model{end}-00001-of-00002{end}", f"model.fp16-00001-of-00001{end}"]
    write(tmp_path, *shards, f"an-old-one-00003-of-00003{end}")
    write_index(tmp_path, index, *shards)
    for reference in (tmp_path, tmp_path / index):
        source = open_checkpoint(reference)
        assert source.tensors.keys() == set(shards) and source.anatomy.stems == {"": stem}


def test_an_index_beside_a_file_of_its_name(tmp_path: Path) -> None:
    """It counts where the file is one of its shards; one whose shards are gone was left behind."""
    index = "model.safetensors.index.json"
    write(tmp_path, "model.safetensors", "vision.safetensors")
    write_index(tmp_path, index, "model.safetensors", "vision.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"model.safetensors", "vision.safetensors"}
    write_index(tmp_path, index, "vision.safetensors", "gone.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"model.safetensors"}
    write_index(tmp_path, index, "vision.safetensors")
    way_on = f"got model.safetensors and the shards of {index}: name the one you mean"
    refused(tmp_path, f"{tmp_path} must have one model, {way_on}")
    assert open_checkpoint(tmp_path / index).tensors.keys() == {"vision.safetensors"}
    assert open_checkpoint(tmp_path / "model.safetensors").tensors.keys() == {"model.safetensors"}


def test_the_index_decides_which_copy_counts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.ones(2), "old": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "2.safetensors")
    weight_map = {"a": "2.safetensors", "b": "1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_checkpoint(tmp_path)
    assert source.tensors.keys() == {"a", "b"} and not source.tied
    assert all(torch.equal(source.tensor(name), torch.ones(2)) for name in "ab")


def test_files_that_nothing_chooses_among(tmp_path: Path) -> None:
    write(tmp_path, "x.safetensors", "y.safetensors")
    way_on = "got x.safetensors, y.safetensors: name the one that you mean"
    refused(tmp_path, f"{tmp_path} must have one file of weights, {way_on}")
    write(tmp_path, "model.fp16.safetensors", "model.non_ema.safetensors", "model.fp16-00001-of-00002.safetensors")
    way_on = "got model.fp16.safetensors, model.non_ema.safetensors: name the one that you mean"
    refused(tmp_path, f"{tmp_path} must have one file of weights, {way_on}")


def test_shards_without_an_index(tmp_path: Path) -> None:
    shards = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    write(tmp_path, *shards)
    message = f"{tmp_path} must have an index of its shards (*.index.json), got none beside {', '.join(shards)}"
    refused(tmp_path, message)
    for shard in shards:
        (tmp_path / shard).unlink()
    write(tmp_path, "model-00001-of-00001.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == {"model-00001-of-00001.safetensors"}
