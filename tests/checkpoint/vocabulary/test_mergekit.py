"""Tokens with rows of their own, in mergekit's merge and in ours."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels.checkpoint import merge
from tests.llama_checkpoints import (
    EMBEDDING,
    HEAD,
    WIDTH,
    Merges,
    StateDict,
    assert_same_bits,
    gaussians,
    models,
    recipe,
    save,
    save_one,
    written,
)
from tests.untied import untied

pytestmark = pytest.mark.any_isa

TOKENS = ["<unk>", "</s>", *(f"word{i}" for i in range(30)), "<pad>"]


def save_tokenizer(folder: Path, tokens: Sequence[str]) -> None:
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    words = {token: i for i, token in enumerate(tokens) if token != "<pad>"}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>"])  # not in the vocabulary of the model itself: it comes last
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    assert fast.get_vocab() == {token: i for i, token in enumerate(tokens)}
    fast.save_pretrained(folder)


def with_rows(state_dict: StateDict, rows: Any) -> StateDict:
    """Other rows in the layers that have one for every token."""
    return {name: tensor[rows] if name in (EMBEDDING, HEAD) else tensor for name, tensor in state_dict.items()}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_tokenizers(merges: Merges, tmp_path: Path, method: str) -> None:
    """A model whose tokens have other rows merges as if it had those of the base; rows without a token go."""
    padded = models(untied, torch.bfloat16)
    aligned = [with_rows(state_dict, slice(len(TOKENS))) for state_dict in padded]
    folders = save(tmp_path, padded)
    tokens = ["a word of its own", *reversed(TOKENS[:-1]), "<pad>"]
    rows = [TOKENS.index(token) if token in TOKENS else 0 for token in tokens]
    save_one(tmp_path / "expert0", with_rows(aligned[1], rows))
    for name, words in (("base", TOKENS), ("expert0", tokens), ("expert1", TOKENS)):  # expert2: as the base
        save_tokenizer(tmp_path / name, words)
    keys = {"parameters": {"weight": 0.3}}  # of the base in "linear"
    stock, ours = merges(recipe(method, folders, base_model=folders[0], tokenizer_source="base", **keys))
    assert ours[EMBEDDING].shape == (len(TOKENS), WIDTH)
    assert [config["vocab_size"] for config in written(tmp_path, "config.json")] == 2 * [len(TOKENS)]
    folders = save(tmp_path / "aligned", aligned)
    given = recipe(method, folders, base_model=folders[0], **keys)
    assert_same_bits(stock, ours)
    assert_same_bits(merges(given)[0], ours)


def test_tokens_that_an_expert_lacks(merges: Merges, tmp_path: Path) -> None:
    state_dicts = models(gaussians, torch.bfloat16)
    folders = save(tmp_path, state_dicts)
    few = [*TOKENS[5:9], *TOKENS[:2], TOKENS[20], "<pad>"]
    save_one(tmp_path / "expert0", with_rows(state_dicts[1], slice(len(few))))
    for name, words in (("base", TOKENS), ("expert0", few)):
        save_tokenizer(tmp_path / name, words)
    assert_same_bits(*merges(recipe("task_arithmetic", folders, tokenizer_source="base")))


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    folders = save(tmp_path, models(gaussians, torch.float32))
    save_tokenizer(tmp_path / "base", TOKENS)
    for folder in (folders[2], folders[0]):
        save_tokenizer(Path(folder), [*(f"own{i}" for i in range(40)), *TOKENS])
        message = rf"^'{HEAD}' of {re.escape(folder)} must have 73 rows for the tokens it has, got 40$"
        with pytest.raises(ValueError, match=message):
            merge(recipe("ties", folders, tokenizer_source="base"), tmp_path / "out")
