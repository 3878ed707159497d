"""What is wrong with a calibration is said in one sentence, before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from surgery_kernels.surgery.checkpoints import calibrate_checkpoint
from tests.fits import refusal

pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

from transformers import BertConfig, BertModel, LlamaForCausalLM

from tests.surgery.checkpoints.language import family, llama, recipe_of, save, texts_of, write_data

pytestmark = pytest.mark.any_isa

Given = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("models")
    recipe = family(folder, llama())
    return recipe, write_data(folder / "data.jsonl", recipe)


def refused(recipe: Any, data: Path, out: Path, **options: Any) -> str:
    sentence = refusal(lambda: calibrate_checkpoint(recipe, data, out, progress=False, **options))
    assert sorted(path.name for path in out.parent.iterdir() if path.name.startswith("out")) == []
    return sentence


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of DATA must be JSON, got: Expecting property name enclosed in double quotes"),
        ('{"text": "w1 w2"}', 'line 1 of DATA must be {"model": "...", "text": "..."}, got {"text": "w1 w2"}'),
        (
            '{"model": "other", "text": "w1"}',
            "line 1 of DATA must have one of the recipe's models (FIRST, SECOND), got 'other'",
        ),
        (
            '{"model": FIRST, "text": "w1 w2"}',
            "DATA must have texts for every model of the recipe, got none for SECOND",
        ),
        (
            '{"model": FIRST, "text": "w1"}\n{"model": SECOND, "text": "w1 w2"}',
            "texts of FIRST must have two tokens or more, got 'w1'",
        ),
    ],
)  # fmt: skip
def test_data(given: Given, line: str, message: str, tmp_path: Path) -> None:
    recipe, _ = given
    data = tmp_path / "lines.jsonl"
    names = {name: model["model"] for name, model in zip(("FIRST", "SECOND"), recipe["models"], strict=True)}
    for name, folder in names.items():
        line, message = line.replace(name, json.dumps(folder)), message.replace(name, repr(folder))
    data.write_text(line)
    assert refused(recipe, data, tmp_path / "out").startswith(message.replace("DATA", str(data)))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"lam": 0.0}, "lam must be finite and greater than 0, got 0.0"),
        ({}, {"max_length": 1}, "max_length must be 2 or greater, got 1"),
        ({}, {"batch_size": 0}, "batch_size must be 1 or greater, got 0"),
        ({}, {"merged": "nowhere"}, "merged must be the folder of a merged model, got 'nowhere'"),
        ({}, {"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        (
            {"tokenizer_source": "union"},
            {},
            "recipe must keep the tokenizer of its models to be calibrated, got another",
        ),
        (
            {"merge_method": "linear", "base_model": None},
            {},
            "anchor must be 1 for a recipe without base_model, got 2.0",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_recipes_and_options(
    given: Given, changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe, data = given
    changed = {key: value for key, value in {**recipe, **changes}.items() if value is not None}
    assert refused(changed, data, tmp_path / "out", **options) == message


def test_slices(given: Given, tmp_path: Path) -> None:
    recipe, data = given
    sources = [{**model, "layer_range": [0, 2]} for model in recipe["models"]]
    sliced = {**{key: value for key, value in recipe.items() if key != "models"}, "slices": [{"sources": sources}]}
    assert refused(sliced, data, tmp_path / "out") == "recipe must be of whole models to be calibrated, got slices"


def test_models_that_are_no_language_models(given: Given, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=30, max_position_embeddings=8, **sizes)
    folders = {name: save(tmp_path / name, BertModel(config)) for name in ("base", "first", "second")}
    recipe = recipe_of(folders)
    data = write_data(tmp_path / "data.jsonl", recipe)
    assert re.search("must have .* for BertLMHeadModel, got none$", refused(recipe, data, tmp_path / "out"))


def test_no_tokenizer_or_another(given: Given, tmp_path: Path) -> None:
    recipe = family(tmp_path, llama())
    data = write_data(tmp_path / "data.jsonl", recipe)
    tokenizer = tmp_path / "first" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"] |= {"w1": 4, "w2": 3}
    tokenizer.write_text(json.dumps(content))
    name, text = recipe["models"][0]["model"], texts_of(0)[0]
    message = f"{name} must read texts as the merged model does, got other tokens for {text[:60]!r}"
    assert refused(recipe, data, tmp_path / "out") == message
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    message = f"{recipe['base_model']} must have a tokenizer for the texts, got none in its folder"
    assert refused(recipe, data, tmp_path / "out") == message


def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    recipe = family(tmp_path, llama())
    other = llama()
    other.num_hidden_layers = 4
    save(tmp_path / "second", LlamaForCausalLM(other))
    data = write_data(tmp_path / "data.jsonl", recipe)
    assert "layers.3" in refused(recipe, data, tmp_path / "out")
