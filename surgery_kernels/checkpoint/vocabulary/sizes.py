"""How many tokens a configuration says that a model has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LANGUAGE = (
    "text_config", "llm_config", "llm_cfg", "language_config", "language_model", "lm_config", "text_model_config",
    "thinker_config", "decoder",
)  # fmt: skip
PLAIN = ("vocab_size", "padded_vocab_size", "n_vocab")
PER_LAYER = "vocab_size_per_layer_input"


def inner_configs(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of the language models within a configuration, by their keys."""
    return {key: config[key] for key in LANGUAGE if isinstance(config.get(key), Mapping)}


@dataclass(frozen=True)
class Size:
    """A number of tokens in a configuration."""

    path: tuple[str, ...]
    value: int

    @property
    def is_of_language(self) -> bool:
        return self.path[-1] in PLAIN and set(self.path[:-1]) <= set(LANGUAGE)


def sizes_in(config: Mapping[str, Any]) -> list[Size]:
    """Of the vocabularies of a configuration and of those in it; that of the tokenizer comes first."""
    found = [Size(path, value) for path, value in numbers_in(config) if "vocab" in path[-1] and "type" not in path[-1]]
    return sorted(found, key=lambda size: (not size.is_of_language, len(size.path)))


def numbers_in(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """The whole numbers in a configuration and in those in it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, (*path, str(key)))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, str(key)), value


def resized(config: Mapping[str, Any], before: int, after: int, per_layer: int | None) -> dict[str, Any]:
    """A configuration with another number of tokens, wherever it says that number.

    Args:
        config: Of the donor.
        before: How many rows its tensors have.
        after: How many they have in the result.
        per_layer: How many those have that are added in every layer; None: there are none.
    """
    changed = dict(config)
    if per_layer is not None:
        for size in (size for size in sizes_in(config) if size.path[-1] == PER_LAYER):
            changed = _put(changed, size.path, per_layer)
    if before == after:
        return changed
    sizes = [size for size in sizes_in(config) if size.path[-1] != PER_LAYER]
    saying = [size.path for size in sizes if size.value == before]
    if not saying:  # a number that it leaves to the defaults, or another one
        inside = next(iter(inner_configs(config)), None)
        of_language = [size.path for size in sizes if size.is_of_language]
        saying = of_language[:1] or [("vocab_size",) if inside is None else (inside, "vocab_size")]
        # OLMo's name for the number of rows, where that is not the number of tokens
        saying += [path for path, value in numbers_in(config) if path[-1] == "embedding_size" and value == before]
    for path in saying:
        changed = _put(changed, path, after)
    return changed


def _put(config: Mapping[str, Any], path: Sequence[str], value: int) -> dict[str, Any]:
    key, *inner = path
    return {**config, key: _put(config[key], inner, value) if inner else value}
