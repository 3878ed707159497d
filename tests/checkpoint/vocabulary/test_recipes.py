"""Recipes with a tokenizer, in the forms that people publish, run by mergekit and by us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from surgery_kernels.checkpoint import merge
from surgery_kernels.recipes import load_recipes
from tests.checkpoint.test_recipes import SEED, assert_same_config, assert_same_model, by_mergekit
from tests.checkpoint.vocabulary.test_mergekit import save_bpe, special, with_rows
from tests.llama_checkpoints import loaded, models, save_one
from tests.untied import untied

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore::UserWarning")]
transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yml"))
WORDS = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(3, 30))]
TEMPLATES = {"chat": "{{ 'a' }} of chat", "a": "{{ 'a' }} of chat"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, chat with two tokens more, and short with fewer and in another order."""
    folder = tmp_path_factory.mktemp("models")
    added = {"chat": ["<|im_start|>", "<|im_end|>"]}
    words = {"short": [*WORDS[:3], *WORDS[:12:-1]]}
    names = ("base", "a", "chat", "short")
    for name, tensors in zip(names, models(untied, torch.bfloat16), strict=True):
        tokens = words.get(name, WORDS), added.get(name, [])
        save_one(folder / name, with_rows(tensors, slice(sum(map(len, tokens)))))
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        save_bpe(folder / name, tokens[0], list(map(special, tokens[1])), **roles)
        if name in TEMPLATES:
            (folder / name / "chat_template.jinja").write_text(TEMPLATES[name])
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_as_mergekit(path: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    by_mergekit(path, tmp_path / "theirs", tmp_path / "between")
    merge(path, tmp_path / "ours", random_seed=SEED)
    (recipe,) = load_recipes(path)
    assert_same_model(loaded(tmp_path / "ours"), loaded(tmp_path / "theirs"), recipe.merge_method)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert_same_config(ours, theirs)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    for of in ("get_vocab", "chat_template", "special_tokens_map", "added_tokens_decoder"):
        values = [getattr(tokenizer, of) for tokenizer in tokenizers]
        assert values[0]() == values[1]() if callable(values[0]) else values[0] == values[1], of
    text = "word5<|im_start|>word6word7</s>"
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
