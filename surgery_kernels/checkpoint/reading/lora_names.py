"""What the names in an adapter's file mean, and what a base calls the same tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .source import Source

PREFIX = "base_model.model."  # in front of every name in an adapter
WRAPPED = ".base_layer"  # stands in the name of what PEFT has wrapped, once for every time
# `lora_A.default.weight` names the adapter too, as in a model that was saved with it
PART = re.compile(
    r"(?P<module>.+)\.lora_(embedding_)?(?P<part>A|B|magnitude_vector)"
    r"(\.(?P<adapter>(?!(weight|bias)$)(?!(weight|bias)\.)[^.]+))?(\.(?P<kind>weight|bias))?"
)
SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.((?P<adapter>[^.]+)\.)?(?P<rest>.+)")
TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.(?P<adapter>[^.]+))?")
ORIGINAL = re.compile(r".+\.(original_module|base_layer\.original_module)\..+")
# Around the same tensors, before transformers 4.52 and since: model.language_model.layers, language_model.model.layers,
# model.layers; model.visual, visual.
AROUND = re.compile(r"^((base_model|model|language_model|text_model|vlm|llm)\.)+")


@dataclass(frozen=True)
class Key:
    """A tensor of an adapter."""

    key: str  # as in its file
    module: str  # as PEFT's model has it, without wrapping
    part: str  # A, B, B.bias, magnitude_vector, tokens, or the rest of the name of a tensor that replaces the base's
    depth: int  # how many of the wrappers around the module are inside this one
    embedding: bool = False
    saved: bool = False  # known by its name to be of modules_to_save

    @property
    def is_factor(self) -> bool:
        return self.part in ("A", "B", "B.bias", "magnitude_vector")


def parsed(adapter: str, names: Collection[str]) -> list[Key]:
    """Raises ValueError for a file of several adapters."""
    keys, adapters = [], set()
    for key in names:
        name = key.removeprefix(PREFIX)
        if ORIGINAL.fullmatch(name):
            continue
        if found := PART.fullmatch(name):
            part = "B.bias" if found["kind"] == "bias" else found["part"]
            module = found["module"]
            depth = module.count(WRAPPED)
            keys.append(Key(key, module.replace(WRAPPED, ""), part, depth, ".lora_embedding_" in name))
        elif found := TOKENS.fullmatch(name):
            keys.append(Key(key, found["module"].replace(WRAPPED, ""), "tokens", 0))
        elif found := SAVED.fullmatch(name):
            keys.append(Key(key, found["module"], found["rest"], 0, saved=True))
        else:
            depth = name.count(WRAPPED)
            module, _, rest = name.replace(WRAPPED, "").rpartition(".")
            keys.append(Key(key, module, rest, depth))
        if found and found["adapter"]:
            adapters.add(found["adapter"])
    if len(adapters) > 1:
        raise ValueError(f"{adapter} must hold one adapter, got {', '.join(sorted(adapters))}")
    return keys


class NamesInBase:
    """Finds the tensors of a base by the names of the model that an adapter was trained in."""

    def __init__(self, wanted: Collection[str], base: Source) -> None:
        """`wanted`: all names that will be looked for; they may lack or have the same prefix."""
        self._base = base
        self._prefixes = ("", "")
        for removed, added in _prefixes(wanted, base):
            if all(f"{added}{name.removeprefix(removed)}" in base.tensors for name in wanted):
                self._prefixes = (removed, added)
                break
        self._alike: dict[str, list[str]] = {}
        for name in base.tensors:
            self._alike.setdefault(AROUND.sub("", name), []).append(name)

    def find(self, name: str) -> str | None:
        if name in self._base.tensors:
            return name
        removed, added = self._prefixes
        if (other := f"{added}{name.removeprefix(removed)}") in self._base.tensors:
            return other
        alike = self._alike.get(AROUND.sub("", name), [])
        return alike[0] if len(alike) == 1 else None


def _prefixes(wanted: Collection[str], base: Source) -> Iterator[tuple[str, str]]:
    """A checkpoint may be of a model without its head, and the adapter of the whole, or the other way round."""
    yield "", ""
    for prefix in dict.fromkeys(name.partition(".")[0] for name in wanted):
        yield f"{prefix}.", ""
    for prefix in dict.fromkeys(name.partition(".")[0] for name in base.tensors):
        yield "", f"{prefix}."
