"""Which rows of two vocabularies belong to the same token."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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


def shared_rows(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Rows | None:
    """The rows of the tokens that both know; None where every one of ours has the same row there."""
    if all(theirs.get(token) == row for token, row in ours.items()):
        return None
    pairs = sorted((row, theirs[token]) for token, row in ours.items() if token in theirs)
    return Rows(*torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))
