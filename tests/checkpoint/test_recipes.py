"""Recipes in every form that people publish, run by mergekit's own commands and by this one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from surgery_kernels.checkpoint import merge
from surgery_kernels.recipes import load_recipes
from tests.cases import bits
from tests.llama_checkpoints import StateDict, loaded, models, save_one
from tests.untied import untied

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore:recipe")]

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yml"))
SEED = 42
# What is not mergekit's to the bit: it rounds every step, ours once.
ROUNDED = ("slerp", "karcher")
SUMMED = ("nuslerp", "multislerp", "model_stock")  # where sums of 32 bits, in torch's order, are not rounded to 16
# What has something that has no effect.
NOTICED = (
    "ignored-keys",
    "karcher",
    "model_stock",
    "model_stock-16-bits",
    "sce",
    "task_arithmetic",
    "task_arithmetic-base-alone",
    "task_arithmetic-slices",
    "ties-gradients",
)
FAR = 16  # last places of the largest entry, of those


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b and c, and wide, which is a in float32."""
    folder = tmp_path_factory.mktemp("models")
    state_dicts = models(untied, torch.bfloat16)
    for name, tensors in zip(("base", "a", "b", "c"), state_dicts, strict=True):
        save_one(folder / name, tensors)
    save_one(folder / "wide", {name: tensor.float() for name, tensor in state_dicts[1].items()})
    return folder


def by_mergekit(path: Path, out: Path, between: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", str(SEED)]
    if len(list(yaml.safe_load_all(path.read_text()))) > 1:
        command = importlib.import_module("mergekit.scripts.multimerge").main
        arguments = [str(path), "--out-path", str(out), "--intermediate-dir", str(between)]
    else:
        command = importlib.import_module("mergekit.scripts.run_yaml").main
        arguments = [str(path), str(out)]
    command.main([*arguments, *options], standalone_mode=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_as_mergekit(path: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    by_mergekit(path, tmp_path / "theirs", tmp_path / "between")
    merge(path, tmp_path / "ours", random_seed=SEED)
    assert any(recipe.notices for recipe in load_recipes(path)) == (path.stem in NOTICED)
    assert_same_model(loaded(tmp_path / "ours"), loaded(tmp_path / "theirs"), load_recipes(path)[-1].merge_method)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert_same_config(ours, theirs)
    (dtype,) = {tensor.dtype for tensor in loaded(tmp_path / "ours").values()}  # which mergekit does not always tell
    assert f"torch.{ours['dtype']}" == str(dtype)


# As many layers as the models have: the lists of a configuration do not follow mergekit's slices, and it fails
SLICES = """
merge_method: task_arithmetic
base_model: MODELS/base
slices:
  - sources:
      - {model: MODELS/base, layer_range: [0, 2]}
      - {model: MODELS/a, layer_range: [1, 3], parameters: {weight: [{filter: .1., value: 0.25}, {value: [0, 1]}]}}
  - sources: [{model: MODELS/a, layer_range: [0, 1]}, {model: MODELS/base, layer_range: [1, 2]}]
parameters: {weight: [1, 0.5], lambda: [{filter: .2., value: 0.5}]}
dtype: float32
"""
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 20, "intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {**SIZES, "num_key_value_heads": 1},
    "Qwen2ForCausalLM": {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {**SIZES, "num_key_value_heads": 1, "head_dim": 4},
    "Gemma2ForCausalLM": {**SIZES, "num_key_value_heads": 1, "head_dim": 4},
    "Phi3ForCausalLM": {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0},
    "GPT2LMHeadModel": {"n_embd": 8, "n_head": 2, "n_layer": 3, "vocab_size": 20, "n_positions": 8},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    of_model = getattr(transformers, architecture)
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(seed)
        model = of_model(of_model.config_class(**ARCHITECTURES[architecture]))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / name)
    path = tmp_path / "recipe.yml"
    # mergekit keeps what it has opened by its name: another one for every test
    path.write_text(SLICES.replace("MODELS", str(tmp_path)))
    by_mergekit(path, tmp_path / "theirs", tmp_path / "between")
    merge(path, tmp_path / "ours")
    assert_same_model(loaded(tmp_path / "ours"), loaded(tmp_path / "theirs"), "task_arithmetic")
    ours, theirs = (transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.num_hidden_layers == theirs.num_hidden_layers == 3
    if layer_types := getattr(of_model.config_class(**ARCHITECTURES[architecture]), "layer_types", None):
        assert ours.layer_types == [layer_types[layer] for layer in (0, 1, 1)]
    _, loading = of_model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading.values()), loading


def assert_same_model(ours: StateDict, theirs: StateDict, method: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape and tensor.dtype == theirs[name].dtype, name
        if method in ROUNDED or (method in SUMMED and tensor.dtype == torch.float32):
            assert far_apart(tensor, theirs[name]) < 0.001 * tensor.numel() + 1, name
        else:
            assert torch.equal(bits(tensor), bits(theirs[name])), name


def far_apart(ours: Tensor, theirs: Tensor) -> int:
    """How many entries."""
    tolerance = FAR * torch.finfo(ours.dtype).eps * theirs.abs().max()
    return int(((ours - theirs).abs() > tolerance).sum())


def assert_same_config(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """But for what transformers adds, and the dtype."""
    assert {"num_hidden_layers"} <= {key for key in ours if key in theirs}
    assert {**ours, "dtype": None} == {**{key: theirs.get(key) for key in ours}, "dtype": None}
