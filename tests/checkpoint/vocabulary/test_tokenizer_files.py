"""Tokenizers that lose tokens or get new ones, as the tokenizers library reads what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from surgery_kernels.checkpoint.vocabulary.tokenizer_files import with_tokens
from surgery_kernels.checkpoint.vocabulary.tokens import Tokens, read_tokens

pytestmark = pytest.mark.any_isa
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed", exc_type=ImportError)

WORDS = ["<unk>", "a", "b", "c", "ab", "abc"]
NUMBERS = {word: i for i, word in enumerate(WORDS)}
MODELS: dict[str, Any] = {
    "BPE": lambda: tokenizers.models.BPE(NUMBERS, [("a", "b"), ("ab", "c")], unk_token="<unk>"),
    "WordLevel": lambda: tokenizers.models.WordLevel(NUMBERS, unk_token="<unk>"),
    "WordPiece": lambda: tokenizers.models.WordPiece(NUMBERS, unk_token="<unk>"),
    "Unigram": lambda: tokenizers.models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], 0),
}


def save(folder: Path, kind: str, **settings: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(MODELS[kind]())
    tokenizer.add_special_tokens([tokenizers.AddedToken("<x>", rstrip=True)])
    tokenizer.add_tokens(["<y>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def changed(folder: Path, gone: Collection[str] = (), new: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """The library's tokenizer without some tokens and with others."""
    before = read_tokens(folder)
    ids = {token: row for token, row in before.ids.items() if token not in gone}
    following = 1 + max(ids.values())
    ids |= {token: following + i for i, token in enumerate(new or {})}
    added = {token: options for token, options in before.added.items() if token in ids} | dict(new or {})
    files = with_tokens(folder, before, Tokens(ids, added))
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            assert isinstance(content, str)
            (folder / name).write_text(content, encoding="utf-8")
    assert read_tokens(folder).ids == ids
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab() == ids
    return tokenizer


@pytest.mark.parametrize("kind", MODELS)
def test_new_tokens_are_as_the_library_adds_them(tmp_path: Path, kind: str) -> None:
    library = save(tmp_path, kind)
    new = {"<s>": {"special": True, "lstrip": True}, "wörd": {"normalized": True}, "one": {"single_word": True}}
    tokenizer = changed(tmp_path, new=new)
    library.add_special_tokens([tokenizers.AddedToken("<s>", lstrip=True)])
    library.add_tokens(["wörd", tokenizers.AddedToken("one", single_word=True)])
    assert json.loads(tokenizer.to_str()) == json.loads(library.to_str())
    for text in ("abc<s> wördab", "one<x>ab<y>"):
        assert tokenizer.encode(text).ids == library.encode(text).ids


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_that_go(tmp_path: Path, kind: str) -> None:
    save(tmp_path, kind)
    tokenizer = changed(tmp_path, gone=["<y>"])
    assert tokenizer.encode("<x>").tokens == ["<x>"]
    tokenizer = changed(tmp_path, gone=["<x>", "abc"])
    assert tokenizer.encode("abc").tokens != ["abc"]
    assert changed(tmp_path, new={"<z>": {"special": True}}).token_to_id("<z>") == len(WORDS) - 1


def test_merges_with_tokens_that_go(tmp_path: Path) -> None:
    save(tmp_path, "BPE")
    tokenizer = changed(tmp_path, gone=["<x>", "<y>", "abc"])
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"] == [["a", "b"]]
    assert tokenizer.encode("abc").tokens == ["ab", "c"]
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = ["a b"]  # as older versions of the library write them
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert changed(tmp_path, gone=["ab"]).encode("abc").tokens == ["a", "b", "c"]


def test_other_files(tmp_path: Path) -> None:
    """What holds the tokens a second time would hold the old ones."""
    save(tmp_path, "BPE", pad_token="<x>", added_tokens_decoder={"6": {"content": "<x>"}, "7": {"content": "<y>"}})
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).write_text("{}")
    changed(tmp_path, gone=["<y>"], new={"<z>": {"special": True}})
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<x>"
    flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    assert settings["added_tokens_decoder"] == {
        "6": {"content": "<x>", "rstrip": True, **flags},
        "7": {"content": "<z>", "rstrip": False, **flags},
    }


def test_errors(tmp_path: Path) -> None:
    tokens = Tokens({"a": 0, "b": 3}, {})
    message = f"{tmp_path} must have a tokenizer.json for its tokens to be changed, got none: transformers'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        with_tokens(tmp_path, tokens, tokens)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": tokens.ids, "merges": []}}))
    message = (
        f"{tmp_path / 'tokenizer.json'} must number its tokens without a gap for its tokens to be changed, got 'c' for "
        f"2 or 4"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        with_tokens(tmp_path, tokens, Tokens({**tokens.ids, "c": 4}, {"c": {}}))
