"""The tokens of a model and their ids."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index

from ..reading.files import read_json
from ..reading.source import Source


def ids_by_token(model: Source) -> dict[str, int] | None:
    """The vocabulary in the tokenizer.json of a model; None without one.

    Raises:
        ValueError: the file is not what the tokenizers library writes.
    """
    path = None if model.folder is None else model.folder / "tokenizer.json"
    if path is None or not path.is_file():
        return None
    tokenizer = read_json(path)
    try:
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        if not isinstance(vocabulary, Mapping):  # Unigram lists pairs of token and score
            vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
        added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}
        return {token: index(row) for token, row in {**vocabulary, **added}.items()}
    except (AttributeError, LookupError, TypeError):
        raise ValueError(f"{path} must hold tokens and their ids as the tokenizers library writes them") from None
