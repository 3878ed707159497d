"""The least that a recipe says of a method, made from what the method declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ..merging import Method
from ..merging.method import NONE_GIVEN

MODELS = ("models/base", "models/math", "models/code", "models/chat")
GIVEN: dict[str, Any] = {"t": 0.3, "first": 0.2, "last": 0.9, "task": 1}  # where a recipe must say something ...
OTHERWISE = 0.25  # ... and what else
LISTS_ITS_BASE = ("slerp", "nearswap", "arcee_fusion")  # as mergekit has it


def example_of(method: type[Method], models: Sequence[str] = MODELS) -> dict[str, Any]:
    """A recipe of the first of `models` as the base and as many others as the method takes, three if it takes any."""
    least, most = method.num_experts
    count = most or max(least, 3)
    required = [p for p in method.parameters() if p.key and p.recipe_default is NONE_GIVEN]
    numbers = {p.key: 1 / count if method.name == "dni" else GIVEN.get(p.name, OTHERWISE) for p in required}
    listed = models[0 if method.name in LISTS_ITS_BASE else 1 : 1 + count]
    has_base = {} if method.base == "none" else {"base_model": models[0]}
    given = {"parameters": numbers} if numbers else {}
    return {"merge_method": method.name, **has_base, "models": [{"model": model} for model in listed], **given}


def as_yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False)
