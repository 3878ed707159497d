"""YAML in which a key that is written twice does not go unnoticed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

BETWEEN = re.compile(r"^---(?=\s|$)", re.MULTILINE)  # documents; YAML has it nowhere else at the start of a line


class _Loader(yaml.SafeLoader):
    """PyYAML's own keeps the last of equal keys without a word."""

    repeated: list[str]  # of the document that is being read

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        marks: dict[tuple[str, Any], yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = marks.setdefault((key.tag, key.value), key.start_mark)
            if first is not key.start_mark:
                before, here = first.line + 1, key.start_mark.line + 1
                self.repeated.append(f"line {before} has {key.value!r}, which line {here} has again and replaces")
        return node


@dataclass(frozen=True)
class Document:
    """What a document holds, and its text."""

    value: Any
    text: str
    repeated: tuple[str, ...] = ()  # notices of keys that are written twice


def load_documents(text: str, name: str) -> list[Document]:
    """The documents of a YAML text; of several those that hold nothing are left out.

    Args:
        text: Documents, apart by lines of ---.
        name: Of the text, for errors.

    Raises:
        ValueError: it is not YAML; names the line.
    """
    try:
        found = list(_documents(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = (error.problem or "").removeprefix("but ")
        raise ValueError(f"{name} must be valid YAML, got an error in line {line}: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character, a month 13, lists without end
        raise ValueError(f"{name} must be valid YAML, got {' '.join(str(error).split())}") from None
    if len(found) < 2:
        (value, _, repeated) = found[0] if found else (None, 0, ())
        return [Document(value, text, repeated)]
    marks = [0, *(mark.end() for mark in BETWEEN.finditer(text)), len(text) + 1]
    return [
        Document(value, BETWEEN.sub("", text[begin:end]).strip() + "\n", repeated)
        for value, start, repeated in found
        for begin, end in pairwise(marks)
        if begin <= start < end
    ]


def _documents(text: str) -> Iterator[tuple[Any, int, tuple[str, ...]]]:
    """What each holds that holds anything, where in the text that begins, and its notices."""
    loader = _Loader(text)
    loader.repeated = []
    try:
        while loader.check_node():
            node = loader.get_node()
            value = loader.construct_document(node)
            if value is not None:
                yield value, node.start_mark.index, tuple(loader.repeated)
            loader.repeated = []
    finally:
        loader.dispose()
