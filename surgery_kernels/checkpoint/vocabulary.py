"""Which rows of two vocabularies belong to the same token."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from .files import read_json
from .source import Source

INPUT_LAYERS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Rows:
    """Row ``there[i]`` of a model is row ``here[i]`` of the result."""

    here: Tensor  # int64 [num_tokens]
    there: Tensor

    @property
    def num_there(self) -> int:
        """How many rows the model must have."""
        return 1 + max(self.there.tolist(), default=-1)

    @property
    def identity(self) -> str:
        return hashlib.sha256(torch.stack([self.here, self.there]).numpy().tobytes()).hexdigest()


def is_vocabulary(name: str) -> bool:
    return name.endswith(INPUT_LAYERS + OUTPUT_LAYERS)


def tied_to(name: str, model: Source) -> str | None:
    """The input layer of a model that stores its output layer `name` as nothing but that."""
    if not name.endswith(OUTPUT_LAYERS) or (model.config or {}).get("tie_word_embeddings") is False:
        return None
    inputs = [own for own in model.tensors if own.endswith(INPUT_LAYERS)]
    return inputs[0] if len(inputs) == 1 else None


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


def shared_rows(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Rows | None:
    """The rows of the tokens that both know; None where every one of ours has the same row there."""
    if all(theirs.get(token) == row for token, row in ours.items()):
        return None
    pairs = sorted((row, theirs[token]) for token, row in ours.items() if token in theirs)
    return Rows(*torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))
