"""Vocabularies of several sizes cut to the rows that all models have, as mergekit does where it is told to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.cli import main
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import save_safetensors, state_dict
from tests.llama_checkpoints import EMBEDDING, HEAD, VOCABULARY, assert_same_bits, gaussians, loaded, models, save_one

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore:unsafe")]

ROWS = {"large": VOCABULARY, "small": VOCABULARY - 3, "middle": VOCABULARY - 1}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The base has the most rows; the smallest model has one row less in its head than in its embedding."""
    found = []
    for (name, rows), tensors in zip(ROWS.items(), models(gaussians, torch.bfloat16), strict=False):
        tensors[EMBEDDING] = tensors[EMBEDDING][:rows].clone()
        tensors[HEAD] = tensors[HEAD][: rows - (name == "small")].clone()
        found.append(save_one(tmp_path / name, tensors))
    return found


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "model_stock"])
def test_as_mergekit(folders: list[str], tmp_path: Path, method: str) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    command = importlib.import_module("mergekit.scripts.run_yaml").main
    each = [{"model": folder, "parameters": {"weight": 0.5}} for folder in folders]
    given = {"merge_method": method, "base_model": folders[0], "models": each}
    (tmp_path / "r.yml").write_text(json.dumps(given))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    options = ["--unsafe-truncate-embeddings", "--no-copy-tokenizer", "--quiet"]
    command.main([str(tmp_path / "r.yml"), str(theirs), *options], standalone_mode=False)
    out = CliRunner().invoke(main, ["merge", str(tmp_path / "r.yml"), str(ours), "--unsafe-truncate-embeddings"])
    assert out.exit_code == 0, out.output
    assert_same_bits(loaded(theirs), loaded(ours))
    assert loaded(ours)[EMBEDDING].shape[0] == VOCABULARY - 3 and loaded(ours)[HEAD].shape[0] == VOCABULARY - 4
    for folder in (theirs, ours):
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCABULARY


def recipe(folders: list[str], **keys: Any) -> dict[str, Any]:
    each = [{"model": folder, "parameters": {"weight": 1}} for folder in folders]
    return {"merge_method": "linear", "base_model": folders[0], "models": each, **keys}


def test_what_is_said(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to go on allow vocabulary, or merge by token"):
        merge(recipe(folders), tmp_path / "out")
    with plan_merge(load_recipe(recipe(folders)), unsafe_truncate_embeddings=True) as plan:
        end = f"config.json stays that of {folders[0]}: merge by token (tokenizer_source: base) for a model that can be"
        for name, rows in ((EMBEDDING, VOCABULARY - 3), (HEAD, VOCABULARY - 4)):
            said = f"unsafe: {name!r} has {rows} rows instead of {VOCABULARY}, and {end} loaded"
            assert said in plan.notices
        assert {difference.kind for difference in plan.differences} == {"truncated"}
    equal = [folders[0]] * 2
    with plan_merge(load_recipe(recipe(equal)), unsafe_truncate_embeddings=True) as plan:
        assert not plan.differences and not any("unsafe" in notice for notice in plan.notices)


def test_other_shapes_are_still_refused(folders: list[str], tmp_path: Path) -> None:
    tensors = loaded(Path(folders[1]))
    save_safetensors(Path(folders[1]), {**tensors, EMBEDDING: tensors[EMBEDDING][:, :-1].clone()})
    with pytest.raises(ValueError, match="to go on allow shape$"):
        merge(recipe(folders), tmp_path / "out", unsafe_truncate_embeddings=True)


def test_models_without_a_vocabulary(tmp_path: Path) -> None:
    folder = str(save_safetensors(tmp_path / "a", {"layer.weight": state_dict()["layers.0.weight"]}))
    merge(recipe([folder, folder]), tmp_path / "out", unsafe_truncate_embeddings=True)
    assert loaded(tmp_path / "out").keys() == {"layer.weight"}
