"""A value of a YAML document that knows where it stands, so that what is wrong with it, or ignored, can be named."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Node:
    """A value, its path in the document, and the notices about all of the document."""

    value: Any
    at: str  # such as "recipe.models[1].parameters"
    notices: list[str] = field(default_factory=list)

    def must(self, requirement: str) -> ValueError:
        """The error of a value that does not meet it."""
        return ValueError(f"{self.at} must {requirement}, got {self.value!r}")

    def ignored(self, why: str) -> None:
        """Notes that the value has no effect."""
        self.notices.append(f"{self.at} is ignored{why}")

    def key(self, name: Any, value: Any) -> Node:
        return Node(value, f"{self.at}.{name}", self.notices)

    def keys(self, known: Collection[str], what: str) -> dict[str, Node]:
        """Those of a mapping that are known; the others are ignored, as by mergekit, with a notice.

        Args:
            known: Their names.
            what: Whose keys they are, for notices: "a recipe".
        """
        if not isinstance(self.value, dict):
            raise self.must(f"be a mapping with keys among {', '.join(sorted(known))}")
        found = {}
        for name, value in self.value.items():
            if name in known:
                found[name] = self.key(name, value)
                continue
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f": did you mean {near[0]!r}?" if near else f": {what} has no such key"
            self.key(name, value).ignored(hint)
        return found

    def given(self, known: Collection[str], what: str) -> dict[str, Node]:
        """The same without those that are null, which says nothing."""
        return {name: node for name, node in self.keys(known, what).items() if node.value is not None}

    def entries(self, *, least: int = 1) -> list[Node]:
        """Of a list."""
        if not isinstance(self.value, list):
            raise self.must("be a list")
        if len(self.value) < least:
            raise self.must(f"be a list of at least {('none', 'one')[least]}")
        return [Node(value, f"{self.at}[{i}]", self.notices) for i, value in enumerate(self.value)]

    def one_of(self, choices: Collection[str]) -> str:
        if not isinstance(self.value, str) or self.value not in choices:
            raise self.must(f"be one of {', '.join(map(repr, choices))}")
        return self.value

    def required(self, keys: dict[str, Node], name: str) -> Node:
        """One of its `keys`."""
        if name not in keys:
            raise ValueError(f"{self.at}.{name} must be given, got none")
        return keys[name]
