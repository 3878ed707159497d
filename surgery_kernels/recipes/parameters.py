"""The method of every tensor, with the numbers that a recipe gives for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..merging import Method, Parameter
from ..merging.method import NONE_GIVEN
from .recipe import Recipe
from .settings import Rule, Settings, Value, value_of
from .slices import Output, Slice, Source


def resolve_methods(recipe: Recipe, part: Slice, outputs: Iterable[Output], **options: Any) -> dict[str, Method]:
    """The method of every tensor; tensors with equal ones can be merged together.

    A parameter of a model is the source's own, else that of the slice, of the module, of the recipe, else the method's.
    Filters look for parts of names: of the model's own for what is the model's, of the result's for what is shared.

    Args:
        recipe: Whose method it is.
        part: The slice that the tensors are of.
        outputs: The tensors.
        **options: Values of parameters that recipes do not have.

    Returns:
        A method by name, in the order of `outputs`, with numbers for ``part.experts``.

    Raises:
        ValueError: a tensor lacks a number that the method needs, the numbers do not fit together, or what decides over
            the whole model differs between tensors.

    Source: mergekit 0.1.5, number for number.
    """
    resolved = {output.name: _method(recipe, part, output, options) for output in outputs}
    if recipe.scope == "model":
        _check_one_for_all(recipe, part, resolved)
    return resolved


def check_given(recipe: Recipe) -> None:
    """Raises ValueError for a number that the method needs and no tensor of any model would get."""
    for part in recipe.slices:
        for parameter in (each for each in recipe.method.parameters() if each.recipe_default is NONE_GIVEN):
            for expert in part.experts if parameter.per_model else (None,):
                scopes = part.scopes if expert is None else (expert.settings, *part.scopes)
                if parameter.key and not any(parameter.key in settings for settings in scopes):
                    raise ValueError(_missing(recipe, parameter.key, expert, "any"))


def _method(recipe: Recipe, part: Slice, output: Output, options: Mapping[str, Any]) -> Method:
    values: dict[str, Any] = {}
    for parameter in recipe.method.parameters():
        if parameter.key is None:
            values[parameter.name] = options.get(parameter.name, parameter.recipe_default)
        elif parameter.per_model:
            of_each = [_value(recipe, part, parameter, output, expert) for expert in part.experts]
            values[parameter.name] = None if None in of_each else of_each
        else:
            values[parameter.name] = _value(recipe, part, parameter, output, None)
    method = recipe.method(**values)
    try:
        method.check(len(part.experts))
    except ValueError as error:
        raise ValueError(f"{error} for {output.name}") from None
    return method


def _value(recipe: Recipe, part: Slice, parameter: Parameter, output: Output, expert: Source | None) -> Any:
    """Of the settings the first that says something about the tensor, else the default."""
    key = parameter.key
    assert key is not None
    scopes: Sequence[Settings] = part.scopes if expert is None else (expert.settings, *part.scopes)
    name = output.name if expert is None else expert.own_name(output)
    for settings in scopes:
        value = value_of(settings[key], name, output.depth) if key in settings else None
        if value is not None:
            return _as_taken(parameter, value)
    if parameter.recipe_default is NONE_GIVEN:
        raise ValueError(_missing(recipe, key, expert, name))
    default = parameter.recipe_default
    return Rule(default).at(output.depth) if isinstance(default, tuple) else default


def _as_taken(parameter: Parameter, value: Value) -> Value:
    if isinstance(value, (bool, str)):
        return value
    return int(value) if parameter.kind is int else min(value, parameter.range.high)


def _missing(recipe: Recipe, key: str, expert: Source | None, name: str) -> str:
    if expert is None:
        under_models = any(f".parameters.{key} is ignored" in notice for notice in recipe.notices)
        way_on = ": it is one number for all models, and does not count under one of them" if under_models else ""
        return f"recipe.parameters.{key} must be given for every tensor, got none for {name}{way_on}"
    if expert.at is None:
        return (
            f"recipe.parameters.{key} must be given for the base_model {expert.model}, which {recipe.merge_method} "
            f"merges too, got none for {name}"
        )
    return f"{expert.at}.parameters.{key} must be given for every tensor, got none for {name} of {expert.model}"


def _check_one_for_all(recipe: Recipe, part: Slice, resolved: Mapping[str, Method]) -> None:
    for parameter in recipe.method.decides_by:
        for t, expert in enumerate(part.experts):
            first: dict[float | None, str] = {}
            for name, method in resolved.items():
                values = getattr(method, parameter)
                first.setdefault(None if values is None else values[t], name)
            if len(first) > 1:
                found = " and ".join(f"{value} for {name}" for value, name in list(first.items())[:2])
                raise ValueError(
                    f"{parameter} must be the same for all tensors of {expert.model} in scope: model, got {found}"
                )
