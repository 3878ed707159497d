"""Settings as mergekit writes them: a number, a gradient over the layers, or values for tensors by their names.

    weight: 0.5
    weight: [0, 0.5, 1]                                # from the first layer to the last
    weight: [{filter: mlp, value: 0.5}, {value: 1}]    # the first whose filter is in the name of the tensor

A reader raises a ValueError that goes on from the path of the setting: " must be ..." or "[1].value must be ...".
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..merging import Parameter
from ..ops import arguments

Value = float | bool | str
Reader = Callable[[Any, str], Value]

FLAG = TypeAdapter(bool)


@dataclass(frozen=True)
class Rule:
    """The values of the tensors whose names contain `filter`, or of all."""

    values: tuple[Value, ...]  # from the first layer to the last
    filter: str | None = None

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name

    def at(self, depth: float) -> Value:
        """Numbers are interpolated; of flags and words the one below counts."""
        position = depth * (len(self.values) - 1)
        below = int(position)
        first, second = self.values[below], self.values[min(below + 1, len(self.values) - 1)]
        if isinstance(first, (bool, str)) or isinstance(second, (bool, str)):
            return first
        part = position - below
        return (1 - part) * first + part * second


Setting = tuple[Rule, ...]


def value_of(setting: Setting, name: str, depth: float) -> Value | None:
    """The value of a setting for one tensor, None where nothing is set."""
    for rule in setting:
        if rule.matches(name):
            return rule.at(depth)
    return None


def read_setting(value: Any, read: Reader) -> Setting:
    """A setting from what YAML holds, every value by `read`."""
    if isinstance(value, dict):
        return (_read_rule(value, "", read),)
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return tuple(_read_rule(entry, f"[{i}]", read) for i, entry in enumerate(value))
    return (Rule(_read_values(value, "", read)),)


def reader_of(parameter: Parameter) -> Reader:
    """What reads one value of a parameter, and refuses what it does not take."""

    def read_number(value: Any, at: str) -> Value:
        read = number(value, at)
        if read not in parameter.range:
            raise ValueError(f"{at} must be {parameter.range}, got {value!r}")
        if parameter.kind is int and read != int(read):
            raise ValueError(f"{at} must be a whole number, got {value!r}")
        return read

    def read_choice(value: Any, at: str) -> Value:
        arguments.check_one_of(at, value, parameter.choices)
        return value

    if parameter.choices:
        return read_choice
    return flag if parameter.kind is bool else read_number


def number(value: Any, at: str) -> float:
    """Any finite number; PyYAML takes one like 1e-3, without a point, for a string."""
    try:
        read = float(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"{at} must be a number, got {value!r}") from None
    if not math.isfinite(read):
        raise ValueError(f"{at} must be finite, got {value!r}")
    return read


def flag(value: Any, at: str) -> bool:
    """True or false, also as 1 or 0 and as strings like "yes"."""
    try:
        return FLAG.validate_python(value)
    except ValidationError:
        raise ValueError(f"{at} must be true or false, got {value!r}") from None


def check_keys(mapping: Any, known: Collection[str], at: str = "", where: str = "") -> None:
    """A mapping whose keys are all known; where one is not, the error names the nearest."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{at} must be a mapping with keys among {', '.join(sorted(known))}{where}, got {mapping!r}")
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{at} must have keys among {', '.join(sorted(known))}{where}, got {key!r}{hint}")


def _read_rule(value: Any, at: str, read: Reader) -> Rule:
    check_keys(value, ("filter", "value"), at)
    if "value" not in value:
        raise ValueError(f"{at}.value must be given, got none")
    name_part = value.get("filter")
    if name_part is not None and not isinstance(name_part, str):
        raise ValueError(f"{at}.filter must be a part of tensor names, got {name_part!r}")
    return Rule(_read_values(value["value"], f"{at}.value", read), name_part)


def _read_values(value: Any, at: str, read: Reader) -> tuple[Value, ...]:
    if not isinstance(value, list):
        return (read(value, at),)
    if not value:
        raise ValueError(f"{at} must be a value or a list of at least one, got []")
    return tuple(read(entry, f"{at}[{i}]") for i, entry in enumerate(value))
