"""The numbers that a recipe gives for every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..merging.depths import depths
from .recipe import ModelParameters, Parameters, Recipe
from .settings import Setting, value_of

NORMALIZED = {"linear": True, "task_arithmetic": False, "ties": True}  # unless the recipe says
SMALLEST_SUM = 1e-8  # of weights; by less mergekit divides in "linear" alone


@dataclass(frozen=True)
class TensorParameters:
    """What one tensor is merged with; tensors with equal ones can be merged together."""

    weights: tuple[float, ...]  # of recipe.experts
    densities: tuple[float, ...]  # of recipe.experts, in [0, 1]: 0 leaves an expert out. All 1 but in "ties"
    lam: float
    normalize: bool
    rescale: bool


def resolve_parameters(
    recipe: Recipe, names: Iterable[str], num_layers: int | None = None
) -> dict[str, TensorParameters]:
    """The parameters of every tensor: those of the model, else those of all models, else the method's own.

    Args:
        recipe: Its filters look for parts of the names, its gradients for the layer in them.
        names: Of the tensors to merge.
        num_layers: As in `depths`.

    Returns:
        TensorParameters by name, in the order of `names`.

    Raises:
        ValueError: a tensor gets no weight, the weights of "linear" have no sum to divide by, or trimming over the
            whole model gets a density that differs between tensors.

    Source: mergekit 0.1.5, number for number.
    """
    shared = recipe.parameters or Parameters()
    of_model = {entry.model: entry.parameters or ModelParameters() for entry in recipe.models}
    experts = [of_model.get(model, ModelParameters()) for model in recipe.experts]
    resolved = {}
    for name, depth in depths(names, num_layers).items():
        weights = [_value(name, depth, None, expert.weight, shared.weight) for expert in experts]
        if None in weights:
            raise ValueError(_missing_weight(recipe, weights.index(None), name))
        resolved[name] = TensorParameters(
            tuple(weights),
            tuple(_value(name, depth, 1.0, expert.density, shared.density) for expert in experts),
            _value(name, depth, 1.0, shared.lam),
            _value(name, depth, NORMALIZED[recipe.merge_method], shared.normalize),
            _value(name, depth, False, shared.rescale),
        )
    if recipe.merge_method == "linear":
        _check_sums(resolved)
    if recipe.scope == "model":
        _check_one_density(recipe, resolved)
    return resolved


def _value(name: str, depth: float, default: Any, *settings: Setting | None) -> Any:
    """Of the settings the first that says something about the tensor."""
    values = (value_of(setting, name, depth) for setting in settings if setting is not None)
    return next((value for value in values if value is not None), default)


def _missing_weight(recipe: Recipe, expert: int, name: str) -> str:
    model = recipe.experts[expert]
    listed = [entry.model for entry in recipe.models]
    if model not in listed:
        return (
            f"recipe.parameters.weight must be given for the base_model {model}, which linear sums, got none for {name}"
        )
    at = f"recipe.models[{listed.index(model)}].parameters.weight"
    return f"{at} must be given for every tensor, got none for {name} of {model}"


def _check_sums(resolved: Mapping[str, TensorParameters]) -> None:
    for name, parameters in resolved.items():
        if parameters.normalize and abs(sum(parameters.weights)) < SMALLEST_SUM:
            weights = ", ".join(map(str, parameters.weights))
            raise ValueError(
                f"weights must have a sum other than 0 unless normalize is false, got {weights} for {name}"
            )


def _check_one_density(recipe: Recipe, resolved: Mapping[str, TensorParameters]) -> None:
    for t, model in enumerate(recipe.experts):
        first: dict[float, str] = {}
        for name, parameters in resolved.items():
            first.setdefault(parameters.densities[t], name)
        if len(first) > 1:
            found = " and ".join(f"{density} for {name}" for density, name in list(first.items())[:2])
            raise ValueError(f"density must be the same for all tensors of {model} in scope: model, got {found}")
