"""Tokens with rows of their own, in mergekit's merge and in ours."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.llama_checkpoints import (
    EMBEDDING,
    HEAD,
    WIDTH,
    Merges,
    StateDict,
    assert_same_bits,
    gaussians,
    loaded,
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


def save_bpe(folder: Path, words: Sequence[str], added: Sequence[Any] = (), **special: str) -> None:
    """A tokenizer of mergekit's only kind from which it can take tokens away."""
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.add_tokens(list(added))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def special(token: str) -> Any:
    return importlib.import_module("tokenizers").AddedToken(token, special=True, lstrip=True)


def vocabularies(folder: Path) -> list[dict[str, int]]:
    """Of the last two merges, as transformers reads them."""
    load = importlib.import_module("transformers").AutoTokenizer.from_pretrained
    last = max(folder.glob("*.yml"), key=lambda path: int(path.stem))
    return [load(last.with_suffix(end)).get_vocab() for end in (".mergekit", ".ours")]


def assert_same_rows(merged: tuple[StateDict, StateDict], tokens: Sequence[Mapping[str, int]]) -> None:
    """The same bits for every token, wherever its row is, and for what comes behind them."""
    assert tokens[0].keys() == tokens[1].keys()
    ordered = [[of_one[token] for token in sorted(tokens[0])] for of_one in tokens]
    rest = [
        [row for row in range(len(x[EMBEDDING])) if row not in order] for x, order in zip(merged, ordered, strict=True)
    ]
    stock, ours = (with_rows(x, [*o, *r]) for x, o, r in zip(merged, ordered, rest, strict=True))
    assert_same_bits(stock, ours)


WORDS = [f"word{i}" for i in range(30)]
# of the base and three experts: words, added tokens
DONORS: dict[str, list[tuple[list[str], list[str]]]] = {
    "one adds": [(WORDS, []), (WORDS, ["<a>", "<b>"]), (WORDS, []), (WORDS, [])],
    "two add the same": [(WORDS, ["<x>"]), (WORDS, ["<x>", "<a>"]), (WORDS, ["<a>", "<x>"]), (WORDS, ["<x>"])],
    "three add the same": [(WORDS, []), (WORDS, ["<a>"]), (WORDS, ["<b>", "<a>"]), (WORDS, ["<a>", "<b>"])],
    "others lack": [(WORDS, ["<a>"]), (WORDS[5:], ["<a>"]), (WORDS[::-1], []), (WORDS[:20], ["<a>"])],
    "words of their own": [
        (WORDS, []),
        (["mine", *WORDS[:9]], []),
        (["yours", "mine", *WORDS], ["<a>"]),
        (WORDS[4:], []),
    ],
    "an added word": [(WORDS, []), (WORDS[:-1], ["word29", "<a>"]), (WORDS, []), (WORDS, ["<b>"])],
}


def save_donors(folder: Path, data: Any, dtype: torch.dtype, donors: str) -> list[str]:
    folders = save(folder, models(data, dtype))
    for path, (words, added) in zip(folders, DONORS[donors], strict=True):
        num_tokens = len(words) + len(set(added) - set(words))
        tensors = {name: tensor.clone() for name, tensor in loaded(Path(path)).items()}
        save_one(Path(path), with_rows(tensors, slice(num_tokens)))
        save_bpe(Path(path), words, [special(token) for token in added])
    return folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("donors", DONORS)
def test_union(merges: Merges, tmp_path: Path, donors: str, dtype: torch.dtype) -> None:
    folders = save_donors(tmp_path, gaussians, dtype, donors)
    given = recipe("task_arithmetic", folders, tokenizer_source="union")
    assert_same_rows(merges(given), vocabularies(tmp_path))
    given = recipe("linear", folders[1:], base_model=folders[0], tokenizer={}, parameters={"weight": 0.4})
    assert_same_rows(merges(given), vocabularies(tmp_path))
    given = recipe("task_arithmetic", folders, tokenizer_source="base", dtype="bfloat16")
    assert_same_bits(*merges(given))


@pytest.mark.parametrize("donors", DONORS)
@pytest.mark.parametrize("expert", [0, 1])
def test_the_tokenizer_of_a_model(merges: Merges, tmp_path: Path, donors: str, expert: int) -> None:
    folders = save_donors(tmp_path, untied, torch.float32, donors)
    given = recipe("ties", folders, tokenizer={"source": folders[1 + expert], "pad_to_multiple_of": 16})
    assert_same_bits(*merges(given))
    stock, ours = vocabularies(tmp_path)
    assert stock == ours
    assert [config["vocab_size"] % 16 for config in written(tmp_path, "config.json")] == [0, 0]
