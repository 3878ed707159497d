"""The method of every tensor, with the numbers that a recipe gives for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..merging import Method, Parameter
from ..merging.depths import depths
from ..merging.method import NONE_GIVEN
from .model_reference import ModelReference
from .recipe import Recipe
from .settings import value_of


def resolve_methods(
    recipe: Recipe, names: Iterable[str], num_layers: int | None = None, **options: Any
) -> dict[str, Method]:
    """The method of every tensor; tensors with equal ones can be merged together.

    A parameter of a model is the model's own, else that of all models, else the method's.

    Args:
        recipe: Its filters look for parts of the names, its gradients for the layer in them.
        names: Of the tensors to merge.
        num_layers: As in `depths`.
        **options: Values of parameters that recipes do not have.

    Returns:
        A method by name, in the order of `names`, with numbers for ``recipe.experts``.

    Raises:
        ValueError: a tensor lacks a number that the method needs, the numbers do not fit together, or what decides over
            the whole model differs between tensors.

    Source: mergekit 0.1.5, number for number.
    """
    resolved = {name: _method(recipe, name, depth, options) for name, depth in depths(names, num_layers).items()}
    if recipe.scope == "model":
        _check_one_for_all(recipe, resolved)
    return resolved


def _method(recipe: Recipe, name: str, depth: float, options: Mapping[str, Any]) -> Method:
    values: dict[str, Any] = {}
    for parameter in recipe.method.parameters():
        if parameter.key is None:
            values[parameter.name] = options.get(parameter.name, parameter.recipe_default)
        elif parameter.per_model:
            of_each = [_value(recipe, parameter, name, depth, expert) for expert in recipe.experts]
            values[parameter.name] = None if None in of_each else of_each
        else:
            values[parameter.name] = _value(recipe, parameter, name, depth, None)
    method = recipe.method(**values)
    try:
        method.check(len(recipe.experts))
    except ValueError as error:
        raise ValueError(f"{error} for {name}") from None
    return method


def _value(recipe: Recipe, parameter: Parameter, name: str, depth: float, expert: ModelReference | None) -> Any:
    """Of the settings the first that says something about the tensor, else the default."""
    key = parameter.key
    assert key is not None
    settings = [recipe.settings_of(expert)] if expert is not None else []
    for mapping in (*settings, recipe.settings):
        value = value_of(mapping[key], name, depth) if key in mapping else None
        if value is not None:
            return int(value) if parameter.kind is int else value
    if parameter.recipe_default is NONE_GIVEN:
        raise ValueError(_missing(recipe, key, expert, name))
    return parameter.recipe_default


def _missing(recipe: Recipe, key: str, expert: ModelReference | None, name: str) -> str:
    listed = [entry.model for entry in recipe.models]
    if expert is None:
        return f"recipe.parameters.{key} must be given for every tensor, got none for {name}"
    if expert not in listed:
        return (
            f"recipe.parameters.{key} must be given for the base_model {expert}, which {recipe.merge_method} merges "
            f"too, got none for {name}"
        )
    at = f"recipe.models[{listed.index(expert)}].parameters.{key}"
    return f"{at} must be given for every tensor, got none for {name} of {expert}"


def _check_one_for_all(recipe: Recipe, resolved: Mapping[str, Method]) -> None:
    for parameter in recipe.method.decides_by:
        for t, model in enumerate(recipe.experts):
            first: dict[float, str] = {}
            for name, method in resolved.items():
                first.setdefault(getattr(method, parameter)[t], name)
            if len(first) > 1:
                found = " and ".join(f"{value} for {name}" for value, name in list(first.items())[:2])
                raise ValueError(
                    f"{parameter} must be the same for all tensors of {model} in scope: model, got {found}"
                )
