"""The texts of a task as the encoder reads them: cleaned, drawn and cut into tokens, with the task's head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from ...surgery.seeds import generator
from ..errors import InputError
from .bert import TextEncoder
from .readers import Row
from .tasks import Task

Inputs = dict[str, Tensor]  # input_ids and attention_mask, int64 [texts, tokens]


@dataclass(frozen=True)
class Split:
    """Texts and their classes, those of the same split in the order they were drawn in."""

    inputs: Inputs
    labels: Tensor  # int64 [texts]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> Split:
        return Split({name: x[rows] for name, x in self.inputs.items()}, self.labels[rows])

    def shortened(self) -> Split:
        """Without the padding that all of them have."""
        longest = int(self.inputs["attention_mask"].sum(1).max())
        return Split({name: x[:, :longest] for name, x in self.inputs.items()}, self.labels)


def drawn(task: Task, rows: Iterable[Row], seed: int, at_most: int) -> list[Row]:
    """Texts of known classes in random order, each once; one that has two classes is left out."""
    classes: dict[str, set[str]] = {}
    for text, name in rows:
        if name in task.classes and text.strip():
            classes.setdefault(" ".join(text.split()), set()).add(name)
    found = [(text, names.pop()) for text, names in classes.items() if len(names) == 1]
    order = torch.randperm(len(found), generator=generator(seed, task.name, "texts"))
    return [found[i] for i in order[:at_most].tolist()]


def encoded(tokenizer: Tokenizer, task: Task, rows: list[Row], max_tokens: int) -> Split:
    inputs = tokens(tokenizer, [text for text, _ in rows], max_tokens)
    numbers = {name: number for number, name in enumerate(task.classes)}
    return Split(inputs, torch.tensor([numbers[name] for _, name in rows], dtype=torch.int64))


def tokens(tokenizer: Tokenizer, sentences: list[str], max_tokens: int) -> Inputs:
    """All padded to one length."""
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(length=max_tokens)
    cut = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([text.ids for text in cut]),
        "attention_mask": torch.tensor([text.attention_mask for text in cut]),
    }


@torch.no_grad()
def head_of(encoder: TextEncoder, tokenizer: Tokenizer, classes: Mapping[str, str], max_tokens: int) -> Tensor:
    """A prototype per class, frozen as CLIP's: the embedding of its sentence, without what all have in common.

    float32 [classes, width], normalised.
    """
    embedded = encoder(**tokens(tokenizer, list(classes.values()), max_tokens))
    return F.normalize(embedded - embedded.mean(0), dim=-1)


def check_enough(task: Task, rows: list[Row], needed: int) -> None:
    if len(rows) <= needed:
        raise InputError(f"{task.name} must have more than {needed} texts, got {len(rows)}")
