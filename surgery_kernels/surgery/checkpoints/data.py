"""Unlabeled texts of each expert, from lines of JSON to tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEYS = ("model", "text")
Inputs = dict[str, Tensor]


def read_texts(path: Path, experts: Sequence[str]) -> dict[str, list[str]]:
    """By expert, in their order: what the lines ``{"model": ..., "text": ...}`` have for it.

    Raises:
        ValueError: a line is something else or of another model, or an expert has none.
    """
    texts: dict[str, list[str]] = {expert: [] for expert in experts}
    named = ", ".join(map(repr, experts))
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            at = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{at} must be JSON, got: {error}") from None
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in KEYS):
                raise ValueError(f'{at} must be {{"model": "...", "text": "..."}}, got {line.strip()[:80]}')
            if row["model"] not in texts:
                raise ValueError(f"{at} must have one of the recipe's models ({named}), got {row['model']!r}")
            texts[row["model"]].append(row["text"])
    for expert, of_expert in texts.items():
        if not of_expert:
            raise ValueError(f"{path} must have texts for every model of the recipe, got none for {expert!r}")
    return texts


@dataclass(frozen=True)
class TokenBatches:
    """The texts of one expert, padded to the longest of each batch."""

    batches: tuple[Inputs, ...]

    @property
    def num_tokens(self) -> int:
        """With padding."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @property
    def num_texts(self) -> int:
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @property
    def largest(self) -> int:
        """Number of a token."""
        return max(int(batch["input_ids"].max()) for batch in self.batches)


def tokenized(
    expert: str, texts: Sequence[str], encode: Callable[[str], list[int]], max_length: int, batch_size: int
) -> TokenBatches:
    """Texts of more tokens are cut; those of one length come together, so that little is padded.

    Raises:
        ValueError: a text has less than two tokens, so that nothing follows from anything.
    """
    rows = [encode(text)[:max_length] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) < 2:
            raise ValueError(f"texts of {expert!r} must have two tokens or more, got {text!r}")
    rows.sort(key=len)
    return TokenBatches(tuple(_padded(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)))


def _padded(rows: Sequence[Sequence[int]]) -> Inputs:
    """At the end, where no token of a causal model sees it."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer_of(folder: Path | None) -> Any:
    """The tokenizer in a folder, by transformers; None where there is none."""
    from transformers import AutoTokenizer

    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(folder)


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text)["input_ids"])


def check_same_tokens(name: str, tokenizer: Any, texts: Sequence[str], encode: Callable[[str], list[int]]) -> None:
    """Raises where an expert's own tokenizer reads its texts otherwise than that of the result."""
    own = encoder_of(tokenizer)
    for text in texts:
        if own(text) != encode(text):
            raise ValueError(f"{name} must read texts as the merged model does, got other tokens for {text[:60]!r}")
