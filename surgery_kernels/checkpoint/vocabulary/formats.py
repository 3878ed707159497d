"""Vocabularies in the files of tokenizers that have no tokenizer.json."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from operator import index
from pathlib import Path

VARINT, FIXED64, MESSAGE, FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


def read_words(path: Path) -> dict[str, int]:
    """vocab.txt: a token in every line."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return {token.rstrip("\r"): row for row, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}


def read_numbered(path: Path) -> dict[str, int]:
    """vocab.json: an object of tokens and their ids."""
    return {token: index(row) for token, row in json.loads(path.read_text(encoding="utf-8")).items()}


def read_sentencepiece(path: Path) -> dict[str, int]:
    """The pieces of a sentencepiece model, whose ids are their places."""
    tokens = [_text(piece) for field, piece in _fields(path.read_bytes()) if field == 1]
    return {token: row for row, token in enumerate(tokens)}


def read_tekken(path: Path) -> dict[str, int]:
    """Mistral's tekken.json: special tokens, then pieces of bytes as far as the vocabulary goes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    sizes = content["config"]
    num_special, num_tokens = index(sizes["default_num_special_tokens"]), index(sizes["default_vocab_size"])
    special = {entry["token_str"]: index(entry["rank"]) for entry in content["special_tokens"]}
    special |= {f"<SPECIAL_{row}>": row for row in range(num_special) if row not in special.values()}
    pieces = {byte_level(base64.b64decode(entry["token_bytes"])): index(entry["rank"]) for entry in content["vocab"]}
    return special | {token: num_special + row for token, row in pieces.items() if num_special + row < num_tokens}


def read_tiktoken(path: Path) -> dict[str, int]:
    """Lines of a piece of bytes in base64 and its id; special tokens stand elsewhere."""
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line)
    return {byte_level(base64.b64decode(piece, validate=True)): int(row) for piece, row in pairs}


Reader = Callable[[Path], dict[str, int]]


def byte_level(piece: bytes) -> str:
    """A piece of bytes as tokenizer.json writes it: every byte as a letter that can be seen."""
    return "".join(map(LETTERS.__getitem__, piece))


def _letters() -> list[str]:
    """Printable bytes of Latin-1 are themselves; the others follow from 256 on, in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


LETTERS = _letters()


def _text(piece: bytes) -> str:
    """The first field of one message of a piece."""
    return next(value for field, value in _fields(piece) if field == 1).decode()


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every field of a message that is text or a message itself.

    Raises:
        ValueError: it is no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            _, at = _varint(message, at)
            continue
        if kind == MESSAGE:
            size, at = _varint(message, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError("no protocol buffer")
        if at + size > len(message):
            raise ValueError("a protocol buffer that is cut off")
        if kind == MESSAGE:
            yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where the next begins."""
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("a protocol buffer that is cut off")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
