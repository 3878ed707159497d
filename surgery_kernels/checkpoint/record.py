"""surgery_kernels.json: what a result was made from and how, kept beside it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from .. import _C
from .hashes import Hashes, hash_of
from .memory import Releasing
from .plan import Plan
from .reading.mapped_file import many_files_open
from .reading.opening import open_checkpoint
from .reading.source import Source
from .writing.durable import write_text

RECORD = "surgery_kernels.json"
FORMAT = 1


def write_record(folder: Path, plan: Plan, hashes: Hashes) -> None:
    """Writes the record of a finished result; what an earlier, stopped merge had hashed is read for it again.

    The same bytes for the same plan.
    """
    with Releasing([source.release for source in plan.sources.values()]):
        inputs = _inputs(plan, hashes.inputs)
    methods = Counter(str(step.method) for step in plan.merged)
    record = {
        "format": FORMAT,
        "versions": {"surgery_kernels": _C.build_info()["version"], "torch": torch.__version__},
        "recipe": plan.recipe.source,
        "methods": dict(methods),  # with their parameters and seeds, and how many tensors each merged
        "nonfinite": plan.nonfinite,
        "notices": plan.notices,
        "differences": [f"{found.kind}: {found.sentence}: {found.consequence}" for found in plan.differences],
        "inputs": inputs,
        "tensors": _outputs(folder, hashes.outputs),
    }
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _inputs(plan: Plan, seen: Mapping[tuple[str, str], str]) -> dict[str, dict[str, Any]]:
    """Of every model the tensors that took part, and its own record where it is itself a result."""
    found: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        for wanted in step.inputs if step.method else (step.first,):
            source, key = wanted.source, (wanted.source.name, wanted.name)
            if source.name not in found:
                found[source.name] = {"made": _record_of(source), "tensors": {}}
            tensors = found[source.name]["tensors"]
            if wanted.name not in tensors:
                tensors[wanted.name] = seen[key] if key in seen else hash_of(source.tensor(wanted.name))
    return found


def _record_of(source: Source) -> dict[str, Any] | None:
    """Without the hashes of its tensors: those that took part are told beside it."""
    made = read_record(source.folder) if source.folder else None
    return None if made is None else {**made, "tensors": _digest(made["tensors"])}


def _outputs(folder: Path, seen: Mapping[str, str]) -> dict[str, str]:
    with closing(open_checkpoint(folder)) as result, Releasing([result.release]):
        return {name: seen[name] if name in seen else hash_of(result.tensor(name)) for name in result.tensors}


def _digest(tensors: Mapping[str, str]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(sorted(tensors.items())).encode())


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record in a folder, None where there is none.

    Raises:
        ValueError: it is not one.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("tensors"), dict):
        raise ValueError(f"{path} must be a record of a merge in format {FORMAT}, got another file")
    return record


def record_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record in the folder of a result.

    Raises:
        ValueError: there is none.
    """
    record = read_record(folder)
    if record is None:
        raise ValueError(f"out must hold {RECORD}, got none in {os.fspath(folder)}")
    return record


@dataclass(frozen=True)
class Changed:
    """A tensor that is not as it was written."""

    name: str
    how: str  # "changed", "missing", "added"


def verify(folder: str | os.PathLike[str]) -> Iterator[Changed]:
    """The tensors of a result that are not as its record has them. Reads all of it once.

    Raises:
        ValueError, FileNotFoundError: the folder is no result, or cannot be read.
    """
    record = record_of(folder)
    written: dict[str, str] = record["tensors"]
    with many_files_open(), closing(open_checkpoint(folder)) as result, Releasing([result.release]):
        for name in dict.fromkeys([*written, *result.tensors]):
            if name not in result.tensors:
                yield Changed(name, "missing")
            elif name not in written:
                yield Changed(name, "added")
            elif hash_of(result.tensor(name)) != written[name]:
                yield Changed(name, "changed")


def explained(record: Mapping[str, Any], indent: str = "  ") -> Iterator[str]:
    """Where a result comes from, recursively, a line for each model and each merge."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"{indent}merged by {versions}"
    for method, count in record["methods"].items():
        yield f"{indent}{method}: {count} tensor{'s' * (count != 1)}"
    for notice in record["notices"]:
        yield f"{indent}notice: {notice}"
    for model, of_model in record["inputs"].items():
        yield f"{indent}from {model}: {len(of_model['tensors'])} tensors, {_digest(of_model['tensors'])}"
        if of_model["made"] is not None:
            yield from explained(of_model["made"], f"{indent}  ")
