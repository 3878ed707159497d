"""In what the models differ from the one that names and shapes are taken from, and what can be done about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from .reading.source import Source, TensorInfo
from .vocabulary.layers import is_vocabulary, tied_to

# What a user may allow, with what then happens.
ALLOWABLE = {
    "missing": "the tensors of {first} stand in",
    "extra": "they are left out",
    "vocabulary": "rows are merged as far as both have them, the number of rows is that of {first}",
    "shape": "the tensors of {first} stand in",
    "buffer": "those of {first} are kept",
}
# What needs no permission.
NOTED = {
    "tied": "the input layer stands in",
    "tokens": "rows are merged by token, and the row of {first} stands in for a token that is not there",
    "dtype": "such tensors are merged in the wider dtype",
}
SHOWN = 3  # tensors in a sentence


@dataclass(frozen=True)
class Difference:
    """One way in which one model differs."""

    kind: str  # of ALLOWABLE or NOTED
    model: str
    first: str  # the model it differs from
    details: tuple[str, ...]  # one per tensor

    @property
    def sentence(self) -> str:
        more = len(self.details) - SHOWN
        return f"{self.model} has {', '.join(self.details[:SHOWN])}{f' and {more} more' if more > 0 else ''}"

    @property
    def consequence(self) -> str:
        return (ALLOWABLE | NOTED)[self.kind].format(first=self.first)


@dataclass(frozen=True)
class Match:
    """Which tensor of one model takes part for every name, and what differs."""

    names: Mapping[str, str]  # name -> name in the model; for a name that is not here the first model stands in
    differences: list[Difference]


def match(first: Source, model: Source, merged: Collection[str], *, casts: bool, by_token: bool) -> Match:
    """Looks for the tensors `merged` of `first` in `model`.

    Args:
        casts: The recipe says which dtype all are cast to.
        by_token: The recipe says that vocabularies follow the tokens.
    """
    names: dict[str, str] = {}
    found: dict[str, list[str]] = {kind: [] for kind in (*ALLOWABLE, *NOTED)}
    for name in merged:
        wanted = first.tensors[name]
        own = name if name in model.tensors else tied_to(name, model)
        if own is None:
            found["missing"].append(f"no {name!r}")
            continue
        if own != name:
            found["tied"].append(f"{name!r} tied to {own!r}")
        got = model.tensors[own]
        if got.shape != wanted.shape:
            kind = "shape" if not _differ_in_rows(name, got, wanted) else "tokens" if by_token else "vocabulary"
            found[kind].append(f"{name!r} of shape {list(got.shape)} instead of {list(wanted.shape)}")
            if kind == "shape":
                continue
        if got.dtype != wanted.dtype and not casts:
            found["dtype"].append(f"{name!r} in {_short(got.dtype)} instead of {_short(wanted.dtype)}")
        names[name] = own
    for name in (name for name in first.tensors if name not in merged and name in model.tensors):
        if not torch.equal(first.tensor(name), model.tensor(name)):
            found["buffer"].append(f"other values in {name!r} of {_short(first.tensors[name].dtype)}")
        first.release()
        model.release()
    found["extra"] = [f"{name!r} besides" for name in model.tensors if name not in first.tensors]
    return Match(
        names,
        [Difference(kind, model.name, first.name, tuple(details)) for kind, details in found.items() if details],
    )


def check_allowed(differences: Collection[Difference], allow: Collection[str]) -> None:
    """Raises ValueError for differences that nobody allowed, naming all of them."""
    refused = [d for d in differences if d.kind in ALLOWABLE and d.kind not in allow]
    if refused:
        kinds = {d.kind for d in refused}
        raise ValueError(
            f"models must have the tensors of {refused[0].first} unless allowed, got "
            + "; ".join(f"{d.kind}: {d.sentence}" for d in refused)
            + f"; to go on allow {', '.join(kind for kind in ALLOWABLE if kind in kinds)}"
        )


def _differ_in_rows(name: str, got: TensorInfo, wanted: TensorInfo) -> bool:
    return is_vocabulary(name) and len(got.shape) == 2 and got.shape[1:] == wanted.shape[1:]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
