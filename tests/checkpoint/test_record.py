"""The record beside every result: what it tells, that nothing gets past it, and that it costs no read of its own."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery_kernels import _C
from surgery_kernels.checkpoint import hashes as hashes_module
from surgery_kernels.checkpoint import merge, record
from surgery_kernels.checkpoint.hashes import hash_of
from surgery_kernels.checkpoint.writing import writer
from surgery_kernels.cli import main
from tests.checkpoints import files_in, save_lora, save_models, state_dict, ties_recipe
from tests.failing import after, no_room

pytestmark = pytest.mark.any_isa

RECORD = "surgery_kernels.json"


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return save_models(tmp_path / "models", [state_dict(seed) for seed in range(3)])


@pytest.fixture
def out(tmp_path: Path, folders: list[str]) -> Path:
    merge(ties_recipe(folders), tmp_path / "out")
    return tmp_path / "out"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: xxhash.xxh3_64_hexdigest(x.numpy().tobytes()) for name, x in tensors.items()}


def test_what_it_tells(folders: list[str], out: Path) -> None:
    told = json.loads((out / RECORD).read_text())
    assert told["versions"] == {"surgery_kernels": _C.build_info()["version"], "torch": torch.__version__}
    assert "merge_method: ties" in told["recipe"] and told["nonfinite"] == "error" and told["notices"] == []
    ((method, count),) = told["methods"].items()
    assert method.startswith("Ties(density=[0.5, 0.5]") and count == 4
    assert told["tensors"] == hashes(load_file(out / "model.safetensors"))
    assert list(told["inputs"]) == folders
    for t, folder in enumerate(folders):
        state = hashes(state_dict(t))
        taken = state if t == 0 else {name: state[name] for name in state if name != "position_ids"}
        assert told["inputs"][folder] == {"made": None, "tensors": taken}


def test_as_it_was_written(folders: list[str], out: Path) -> None:
    assert list(record.verify(out)) == []
    result = run("verify", out)
    assert (result.exit_code, result.stdout) == (0, "as it was written\n")
    state = load_file(out / "model.safetensors")
    state["layers.0.weight"][0, 0] += 1
    del state["norm.scale"]
    save_file({**state, "more": torch.ones(1)}, out / "model.safetensors")
    result = run("verify", out)
    assert (result.exit_code, result.stdout) == (1, "layers.0.weight: changed\nnorm.scale: missing\nmore: added\n")
    changed = json.loads(run("verify", out, "--json").stdout)["changed"]
    assert changed[0] == {"tensor": "layers.0.weight", "how": "changed"} and len(changed) == 3
    result = run("verify", folders[0])
    assert result.exit_code == 2 and "out must hold surgery_kernels.json, got none" in result.stderr
    (out / RECORD).write_text("{}")
    assert "must be a record of a merge in format 1" in run("verify", out).stderr


def test_where_it_comes_from(tmp_path: Path, folders: list[str], out: Path) -> None:
    """Also what its inputs were made from, and not of the donor's own record."""
    models = [{"model": str(out), "parameters": {"weight": 1}}, {"model": folders[1], "parameters": {"weight": 1}}]
    merge({"merge_method": "linear", "models": models}, tmp_path / "again")
    lines = run("explain", tmp_path / "again").stdout.splitlines()
    assert lines[0] == str(tmp_path / "again") and lines[2].startswith("  Linear(")
    assert [line.split(":")[0].strip() for line in lines if line.lstrip().startswith("from ")] == [
        f"from {model}" for model in (out, *folders, folders[1])
    ]
    assert any(line.startswith("    Ties(density=") for line in lines)
    told = json.loads(run("explain", tmp_path / "again", "--json").stdout)
    assert told["inputs"][str(out)]["made"]["tensors"] in "\n".join(lines)
    shutil.rmtree(out)
    assert run("explain", tmp_path / "again").stdout.splitlines() == lines
    assert run("explain", folders[0]).exit_code == 2


def test_of_a_resumed_merge(tmp_path: Path, folders: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, though a part of the tensors was hashed by a merge that died."""
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    resumed = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", after(3, __import__("os").pwrite, no_room))
        with pytest.raises(OSError):
            merge(ties_recipe(folders), resumed)
    merge(ties_recipe(folders), resumed, resume=True)
    assert (resumed / RECORD).read_bytes() == (out / RECORD).read_bytes()


def test_of_models_whose_tensors_are_computed(tmp_path: Path, folders: list[str]) -> None:
    """An adapter's are hashed as they are merged."""
    change = torch.ones(2, 6), torch.ones(6, 2)
    adapter = save_lora(tmp_path / "adapter", {"layers.0": change})
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": f"{folders[0]}+{adapter}"}]}
    merge(recipe, tmp_path / "out")
    told = json.loads((tmp_path / "out" / RECORD).read_text())
    ((_, of_model),) = told["inputs"].items()
    assert of_model["tensors"]["layers.0.weight"] == told["tensors"]["layers.0.weight"]
    assert of_model["tensors"]["layers.0.weight"] != hashes(state_dict(0))["layers.0.weight"]


def test_inputs_are_hashed_once(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the read that merges them: nothing is left to be read at the end."""
    seen: list[Tensor] = []
    hash_of = record.hash_of
    monkeypatch.setattr(record, "hash_of", lambda tensor: seen.append(tensor) or hash_of(tensor))
    merge(ties_recipe(folders, scope="model"), tmp_path / "out")
    assert not seen and list(record.verify(tmp_path / "out")) == []


def test_of_several_files(folders: list[str], out: Path, tmp_path: Path) -> None:
    merge(ties_recipe(folders), tmp_path / "parts", max_shard_bytes=100)
    assert (tmp_path / "parts" / RECORD).read_bytes() == (out / RECORD).read_bytes()
    assert len([name for name in files_in(tmp_path / "parts") if name.endswith(".safetensors")]) > 1


def test_what_is_hashed_last_is_waited_for(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow it is."""

    def slowly(tensor: Tensor) -> str:
        time.sleep(0.05)
        return hash_of(tensor)

    monkeypatch.setattr(hashes_module, "hash_of", slowly)
    merge(ties_recipe(folders), tmp_path / "out")
    told = json.loads((tmp_path / "out" / RECORD).read_text())
    assert told["inputs"][folders[0]]["tensors"] == hashes(state_dict(0))
