"""Tokens of tokenizers in every kind of files, as the libraries that wrote them number them."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery_kernels.checkpoint.vocabulary.formats import byte_level, read_sentencepiece, read_words
from surgery_kernels.checkpoint.vocabulary.tokens import Tokens, has_tokenizer, read_tokens

pytestmark = pytest.mark.any_isa

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "##der", "blue"]
GPT2 = {"<|endoftext|>": 4, "a": 0, "b": 1, "ab": 3, "Ġ": 2}
PIECES = ["<unk>", "<s>", "</s>", "▁red", "▁", "blüe"]


def read(folder: Path, files: Mapping[str, Any]) -> Tokens:
    for name, content in files.items():
        data = content if isinstance(content, (bytes, str)) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_tokens(folder)


def numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def sentencepiece(pieces: Sequence[str]) -> bytes:
    """The messages of a model, with fields besides those that count."""

    def field(number: int, data: bytes) -> bytes:
        size, length = len(data), b""
        while size > 0x7F:
            size, length = size >> 7, length + bytes([size & 0x7F | 0x80])
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    messages = (field(1, piece.encode()) + b"\x15\0\0\x80\xbf" + b"\x18\x03" for piece in pieces)
    return b"".join(field(1, message) for message in messages) + field(2, b"\x20\x80\x7d") + b"\x41" + 8 * b"\0"


def tiktoken(pieces: Sequence[bytes]) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces))


def tekken(pieces: Sequence[bytes], num_tokens: int) -> dict[str, Any]:
    return {
        "config": {"pattern": ".+", "default_vocab_size": num_tokens, "default_num_special_tokens": 4},
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for i, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(["<unk>", "<s>", "</s>"])
        ],
    }


DECODER = {"added_tokens_decoder": {"6": {"content": "<x>", "special": True}, "4": {"content": "<y>"}}}
BYTES = [b"a", b"b", b" ", b"\xff", b" ab", b"\n"]
FILES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "vocab.txt": ({"vocab.txt": "\n".join(BERT) + "\n", "config.json": {"model_type": "bert"}}, numbered(BERT)),
    "vocab.txt without an end": (
        {"vocab.txt": "\r\n".join(BERT), "tokenizer_config.json": {"tokenizer_class": "ElectraTokenizerFast"}},
        numbered(BERT),
    ),
    "vocab.json": (
        {"vocab.json": GPT2, "merges.txt": "a b\n", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        GPT2,
    ),
    "vocab.json and added tokens": (
        {
            "vocab.json": GPT2,
            "merges.txt": "a b\n",
            "config.json": {"model_type": "gpt2"},
            "added_tokens.json": {"<b>": 6, "<a>": 5},
            "special_tokens_map.json": {"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<c>"]},
        },
        {**GPT2, "<a>": 5, "<b>": 6, "<pad>": 7, "<c>": 8},
    ),
    "sentencepiece": (
        {"tokenizer.model": sentencepiece(PIECES), "config.json": {"model_type": "mixtral"}},
        numbered(PIECES),
    ),
    "sentencepiece and a decoder": (
        {
            "spiece.model": sentencepiece(PIECES),
            "tokenizer_config.json": {"tokenizer_class": "XLNetTokenizer", **DECODER},
        },
        {**{token: row for token, row in numbered(PIECES).items() if row != 4}, "<x>": 6, "<y>": 4},
    ),
    "tiktoken and a decoder": (
        {"tiktoken.model": tiktoken(BYTES), "tokenizer_config.json": {"tokenizer_class": "KimiTokenizer", **DECODER}},
        {"a": 0, "b": 1, "Ġ": 2, "ÿ": 3, "Ċ": 5, "<x>": 6, "<y>": 4},
    ),
    "tekken": (
        {"tekken.json": tekken(BYTES, 9)},
        {"<unk>": 0, "<s>": 1, "</s>": 2, "<SPECIAL_3>": 3, "a": 4, "b": 5, "Ġ": 6, "ÿ": 7, "Ġab": 8},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    files, expected = FILES[name]
    assert not has_tokenizer(tmp_path)
    assert read(tmp_path, files).ids == expected
    assert has_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "vocab.json", "vocab.json and added tokens", "tekken"])
def test_transformers_reads_the_same(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    tokens = read(tmp_path, FILES[name][0])
    kind = {"tekken": "PreTrainedTokenizerFast"}.get(name, "AutoTokenizer")
    vocabulary = getattr(transformers, kind).from_pretrained(tmp_path).get_vocab()
    assert tokens.ids.items() <= vocabulary.items()


def test_sentencepiece_writes_the_same(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    model = io.BytesIO()
    words = iter([f"{a}{b}e red blüe" for a in "abcdef" for b in "ghijkl"])
    library.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, vocab_size=22, minloglevel=2, user_defined_symbols=["<x>"]
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    processor = library.SentencePieceProcessor(model_proto=model.getvalue())
    expected = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    assert read_sentencepiece(tmp_path / "tokenizer.model") == expected


@given(st.lists(st.text(max_size=200), unique=True))
def test_pieces_of_any_text(tmp_path_factory: pytest.TempPathFactory, pieces: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "tokenizer.model"
    path.write_bytes(sentencepiece(pieces))
    assert read_sentencepiece(path) == numbered(pieces)


def test_bytes_are_the_letters_of_the_library() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed", exc_type=ImportError)
    letters = byte_level(bytes(range(256)))
    assert set(letters) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for text in ("a b\n", "é€", "\x00\x7f\xad"):
        ((found, _),) = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
            text
        )
        assert byte_level(text.encode()) == found


def test_blank_lines_have_rows(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\n\n b\n", encoding="utf-8")
    assert read_words(tmp_path / "vocab.txt") == {"a": 0, "": 1, " b": 2}


HINT = "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"


@pytest.mark.parametrize(
    ("files", "got"),
    [
        ({"spiece.model": sentencepiece(PIECES), "config.json": {"model_type": "t5"}}, "spiece.model"),
        (
            {
                "tokenizer.model": sentencepiece(PIECES),
                "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer"},
            },
            "tokenizer.model of the class XLMRobertaTokenizer",
        ),
        (
            {"vocab.txt": "a 3\n", "bpe.codes": "", "tokenizer_config.json": {"tokenizer_class": "PhobertTokenizer"}},
            "vocab.txt of the class PhobertTokenizer",
        ),
        (
            {"vocab.json": GPT2, "config.json": {"model_type": "m2m_100"}, "sentencepiece.bpe.model": b""},
            "vocab.json, sentencepiece.bpe.model",
        ),
        (
            {"qwen.tiktoken": tiktoken(BYTES), "tokenizer_config.json": {"tokenizer_class": "QWenTokenizer"}},
            "qwen.tiktoken of the class QWenTokenizer",
        ),
        (
            {"tiktoken.model": tiktoken(BYTES), "tokenizer_config.json": {"tokenizer_class": "KimiTokenizer"}},
            "tiktoken.model of the class KimiTokenizer",
        ),
        ({"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}}, "no vocabulary of the class ByT5Tokenizer"),
        ({"merges.txt": "a b"}, "no vocabulary"),
        (
            {"vocab.json": GPT2, "target_vocab.json": GPT2, "config.json": {"model_type": "marian"}},
            "vocab.json of the class MarianTokenizer",
        ),
    ],
)
def test_kinds_that_are_not_read(tmp_path: Path, files: dict[str, Any], got: str) -> None:
    message = f"{tmp_path} must have a tokenizer.json for its tokens to be known, got {got}: {HINT}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(tmp_path, files)


BROKEN: dict[str, dict[str, Any]] = {
    "vocab.json": {"vocab.json": "[1]", "config.json": {"model_type": "gpt2"}},
    "vocab.txt": {"vocab.txt": b"\xff\xfe", "config.json": {"model_type": "bert"}},
    "tokenizer.model": {"tokenizer.model": sentencepiece(PIECES)[:-3], "config.json": {"model_type": "llama"}},
    "spiece.model": {"spiece.model": b"\x0a\x80", "config.json": {"model_type": "xlnet"}},
    "bpe.model": {"bpe.model": b"\x0f", "config.json": {"model_type": "albert"}},
    "tekken.json": {"tekken.json": {"vocab": []}},
    "x.tiktoken": {
        "x.tiktoken": b"!! 1\n",
        "tokenizer_config.json": {"tokenizer_class": "TikTokenTokenizer", **DECODER},
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str) -> None:
    message = f"{tmp_path / name} must hold tokens as its name says, got something else"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(tmp_path, BROKEN[name])


def test_broken_added_tokens(tmp_path: Path) -> None:
    message = f"{tmp_path} must have added tokens by their ids in tokenizer_config.json or added_tokens.json"
    for decoder in ({"x": {"content": "a"}}, {"1": {}}, [], {"1": 3}):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            read(tmp_path, {"tokenizer.json": {}, "tokenizer_config.json": {"added_tokens_decoder": decoder or [1]}})


def fast(vocabulary: Mapping[str, int], added: Sequence[tuple[str, int]] = ()) -> dict[str, Any]:
    entries = [{"id": row, "content": token, "special": True} for token, row in added]
    return {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": entries}


@pytest.mark.parametrize(
    ("vocabulary", "added"),
    [
        ({"a": 0, "b": 1}, []),
        ({"a": 0, "b": 1}, [("b", 1), ("<x>", 2), ("<y>", 3)]),
        ({"a": 1, "b": 3}, [("a", 1), ("<x>", 2)]),
    ],
)
def test_numbers_are_the_librarys(tmp_path: Path, vocabulary: dict[str, int], added: list[tuple[str, int]]) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed", exc_type=ImportError)
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    library.add_special_tokens([token for token, _ in added])
    tokens = read(tmp_path, {"tokenizer.json": fast(vocabulary, added)})
    assert tokens.ids == library.get_vocab()
    assert tokens.added.keys() == {token for token, _ in added}


def test_numbers_that_the_library_would_not_give(tmp_path: Path) -> None:
    message = f"{tmp_path / 'tokenizer.json'} must number '<x>' as the tokenizers library does, 2, got 7"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(tmp_path, {"tokenizer.json": fast({"a": 0, "b": 1}, [("<x>", 7)])})


def test_roles_that_no_file_lists(tmp_path: Path) -> None:
    settings = {
        "pad_token": "<pad>",
        "eos_token": {"content": "b", "lstrip": True},
        "extra_special_tokens": ["<e>", "a"],
    }
    tokens = read(tmp_path, {"tokenizer.json": fast({"a": 0, "b": 1}), "tokenizer_config.json": settings})
    assert tokens.ids == {"a": 0, "b": 1, "<pad>": 2, "<e>": 3}
    assert tokens.unlisted == {"<pad>", "<e>"}
    assert tokens.added["b"] == {"normalized": False, "lstrip": True, "special": True}
