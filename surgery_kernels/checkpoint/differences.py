"""In what the models differ from the one that names and shapes are taken from, and what can be done about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ..ops.arguments import name_of
from .reading.source import Source, TensorInfo
from .vocabulary.layers import tied_to, vocabulary_of

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
    "tokens": "rows are merged by token",
    "truncated": "the rows that all have are merged, and the others are left out",
    "dtype": "such tensors are merged in the wider dtype",
    "computed": "they are not learned, and those of {first} are kept",
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
class Pair:
    """A tensor of the result, by what it is called in the first model and in another."""

    ours: str
    theirs: str  # whether it is there or not
    merged: bool  # False: a buffer, which is copied


@dataclass(frozen=True)
class Match:
    """Which tensors of one model take part, and what differs."""

    names: Mapping[str, str]  # those of `Pair.ours` to the model's; for one that is not here the first model stands in
    differences: list[Difference]


def match(
    first: Source,
    model: Source,
    pairs: Collection[Pair],
    belonging: Collection[str],
    *,
    casts: bool,
    of_other_sizes: str,
) -> Match:
    """Looks for tensors of `first` in `model`.

    Args:
        pairs: What is looked for.
        belonging: The names of the model of which each should be in a pair.
        casts: The recipe says which dtype all are cast to.
        of_other_sizes: What becomes of vocabularies of other sizes: "vocabulary", "tokens" or "truncated".
    """
    names: dict[str, str] = {}
    axes = vocabulary_of(first).axes
    found: dict[str, list[str]] = {kind: [] for kind in (*ALLOWABLE, *NOTED)}
    for pair in (pair for pair in pairs if pair.merged):
        wanted, name = first.tensors[pair.ours], pair.theirs
        own = name if name in model.tensors else tied_to(name, model)
        if own is None:
            found["missing"].append(f"no {name!r}")
            continue
        if own != name:
            found["tied"].append(f"{name!r} tied to {own!r}")
        got = model.tensors[own]
        if got.shape != wanted.shape:
            in_rows = _differ_in_rows(axes.get(pair.ours), got, wanted)
            kind = of_other_sizes if in_rows else "shape"
            found[kind].append(f"{name!r} of shape {list(got.shape)} instead of {list(wanted.shape)}")
            if kind == "shape":
                continue
        if got.dtype != wanted.dtype and not casts:
            found["dtype"].append(f"{name!r} in {name_of(got.dtype)} instead of {name_of(wanted.dtype)}")
        names[pair.ours] = own
    for pair in (pair for pair in pairs if not pair.merged):
        dtype = first.tensors[pair.ours].dtype
        if pair.theirs in model.tensors:
            if not torch.equal(first.tensor(pair.ours), model.tensor(pair.theirs)):
                kind = "computed" if dtype.is_floating_point else "buffer"
                found[kind].append(f"other values in {pair.theirs!r} of {name_of(dtype)}")
            first.release()
            model.release()
        elif dtype.is_floating_point:
            found["missing"].append(f"no {pair.theirs!r}")
    known = {pair.theirs for pair in pairs}
    found["extra"] = [f"{name!r} besides" for name in belonging if name not in known]
    return Match(
        names,
        [Difference(kind, model.name, first.name, tuple(details)) for kind, details in found.items() if details],
    )


def together(differences: Collection[Difference]) -> list[Difference]:
    """Those of several slices as one for every kind and pair of models."""
    details: dict[tuple[str, str, str], list[str]] = {}
    for difference in differences:
        key = difference.kind, difference.model, difference.first
        details[key] = list(dict.fromkeys([*details.get(key, ()), *difference.details]))
    return [Difference(*key, tuple(found)) for key, found in details.items()]


def check_allowed(differences: Collection[Difference], allow: Collection[str]) -> None:
    """Raises ValueError for differences that nobody allowed, naming all of them."""
    refused = [d for d in differences if d.kind in ALLOWABLE and d.kind not in allow]
    if refused:
        kinds = {d.kind for d in refused}
        by_token = ", or merge by token (tokenizer_source: base)" if "vocabulary" in kinds else ""
        raise ValueError(
            f"models must have the tensors of {refused[0].first} unless allowed, got "
            + "; ".join(f"{d.kind}: {d.sentence}" for d in refused)
            + f"; to go on allow {', '.join(kind for kind in ALLOWABLE if kind in kinds)}{by_token}"
        )


def refuse_stranger(first: Source, model: Source) -> None:
    """Raises ValueError for a model that no slice takes a tensor from, whatever is allowed."""
    names = {name.partition(".layers.")[2]: name for name in first.tensors if ".layers." in name}
    alike = [(name, names[end]) for name in model.tensors if (end := name.partition(".layers.")[2]) in names]
    way_on = f": its {alike[0][0]!r} may be the {alike[0][1]!r} there, under another name" if alike else ""
    raise ValueError(f"models must have tensors of {first.name} to take part, got none in {model.name}{way_on}")


def _differ_in_rows(axis: int | None, got: TensorInfo, wanted: TensorInfo) -> bool:
    """Whether the models have different numbers of tokens, and nothing else."""
    if axis is None or len(got.shape) != len(wanted.shape):
        return False
    return all(
        i == axis or ours == theirs for i, (ours, theirs) in enumerate(zip(wanted.shape, got.shape, strict=True))
    )
