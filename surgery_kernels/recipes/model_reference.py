"""Models as mergekit names them: a folder or a hub id, "@revision" and "+adapter"."""

from __future__ import annotations

from dataclasses import dataclass

from .node import Node


@dataclass(frozen=True)
class Location:
    """A folder, or a repository of the hub at a revision: "path@revision"."""

    path: str
    revision: str | None = None

    @classmethod
    def read(cls, node: Node) -> Location:
        if isinstance(node.value, str):
            path, *revisions = node.value.split("@")
            if not path or len(revisions) > 1 or revisions == [""]:
                raise node.must("be path or path@revision (or {model: {path: ...}})")
            return cls(path, revisions[0] if revisions else None)
        keys = node.given(("path", "revision"), "a location")
        node.required(keys, "path")
        for key in keys.values():
            if not isinstance(key.value, str):
                raise key.must("be a string")
        return cls(**{name: key.value for name, key in keys.items()})

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class ModelReference:
    """A model, or one with an adapter on it: "model+adapter"."""

    model: Location
    lora: Location | None = None

    @classmethod
    def read(cls, node: Node) -> ModelReference:
        if isinstance(node.value, str):
            model, *adapters = node.value.split("+")
            if len(adapters) > 1:
                raise node.must("be model or model+adapter (or {model: {path: ...}})")
            of_text = [Location.read(Node(text, node.at, node.notices)) for text in (model, *adapters)]
            return cls(*of_text)
        if not isinstance(node.value, dict):
            raise node.must("be a folder or a hub id")
        keys = node.given(("model", "lora"), "a model")
        node.required(keys, "model")
        return cls(**{name: Location.read(key) for name, key in keys.items()})

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)
