"""Settings as mergekit writes them: a number, a gradient over the layers, or values for tensors by their names.

weight: 0.5
weight: [0, 0.5, 1]                                # from the first layer to the last
weight: [{filter: mlp, value: 0.5}, {value: 1}]    # the first whose filter is in the name of the tensor
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from ..merging import Method, Parameter
from .node import Node

Value = float | bool | str
Reader = Callable[[Node], Value]

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
Settings = Mapping[str, Setting]  # by the keys of the recipe


def value_of(setting: Setting, name: str, depth: float) -> Value | None:
    """The value of a setting for one tensor, None where nothing is set."""
    for rule in setting:
        if rule.matches(name):
            return rule.at(depth)
    return None


def read_settings(node: Node | None, method: type[Method], *, of_model: bool) -> Settings:
    """Those of a mapping that the method has: for one model its own, else all."""
    if node is None:
        return {}
    known = {
        parameter.key: reader_of(parameter)
        for parameter in method.parameters()
        if parameter.key is not None and (parameter.per_model or not of_model)
    }
    if not of_model:
        known |= dict.fromkeys(method.ignored, flag)
    found = node.keys(known, f"{method.name}{' for one model' if of_model else ''}")
    return {name: read_setting(key, known[name]) for name, key in found.items()}


def read_setting(node: Node, read: Reader) -> Setting:
    """A setting, every value by `read`."""
    if isinstance(node.value, dict):
        return (_read_rule(node, read),)
    if isinstance(node.value, list) and any(isinstance(entry, dict) for entry in node.value):
        return tuple(_read_rule(entry, read) for entry in node.entries())
    return (Rule(_read_values(node, read)),)


def reader_of(parameter: Parameter) -> Reader:
    """What reads one value of a parameter, and refuses what it does not take."""

    def read_number(node: Node) -> Value:
        read = number(node)
        if read > parameter.range.high:  # more than all; between two layers it counts as it is
            node.notices.append(f"{node.at} is {read:g}: more than {parameter.range.high:g} counts as that")
        elif read not in parameter.range:
            raise node.must(f"be {parameter.range}")
        if parameter.kind is int and read != int(read):
            raise node.must("be a whole number")
        return read

    if parameter.choices:
        return lambda node: node.one_of(parameter.choices)
    return flag if parameter.kind is bool else read_number


def number(node: Node) -> float:
    """Any finite number; PyYAML takes one like 1e-3, without a point, for a string."""
    try:
        read = float(node.value)
    except (OverflowError, TypeError, ValueError):
        raise node.must("be a number") from None
    if not math.isfinite(read):
        raise node.must("be finite")
    return read


def whole_number(node: Node) -> int:
    read = number(node)
    if read != int(read):
        raise node.must("be a whole number")
    return int(read)


def flag(node: Node) -> bool:
    """True or false, also as 1 or 0 and as strings like "yes"."""
    try:
        return FLAG.validate_python(node.value)
    except ValidationError:
        raise node.must("be true or false") from None


def _read_rule(node: Node, read: Reader) -> Rule:
    keys = node.keys(("filter", "value"), "a rule")
    value = node.required(keys, "value")
    name_part = keys["filter"].value if "filter" in keys else None
    if name_part is not None and not isinstance(name_part, str):
        raise keys["filter"].must("be a part of tensor names")
    return Rule(_read_values(value, read), name_part)


def _read_values(node: Node, read: Reader) -> tuple[Value, ...]:
    if not isinstance(node.value, list):
        return (read(node),)
    if not node.value:
        raise node.must("be a value or a list of at least one")
    return tuple(map(read, node.entries()))
