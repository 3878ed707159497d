"""The slices of a recipe over the modules that its models have."""

from __future__ import annotations

from collections.abc import Mapping

from ..recipes import Recipe
from ..recipes.layers import has_layers
from ..recipes.model_reference import ModelReference
from ..recipes.modules import in_module, modules_of
from ..recipes.slices import Slice
from ..recipes.slices import Source as Listed
from .reading.source import Source


def names_of(source: Source, module: str | None) -> list[str]:
    """The tensors of a model, or of one of its modules."""
    return in_module(module, source.tensors, source.config or {}, source.name)


def slices_over(recipe: Recipe, sources: Mapping[ModelReference, Source]) -> list[Slice]:
    """The slices of all modules of the result: those of the recipe, and what it says nothing of as the donor has it.

    Raises:
        ValueError: a model has not the modules or not the layers that the recipe names.
    """
    for part in recipe.slices:
        _check_one_stack(part, sources[part.first.model])
    found = [_without_layers(recipe, part, sources) for part in recipe.slices]
    donor = Listed(recipe.donor, {})
    return [*found, *(Slice((), donor, donor, (), module=module) for module in left_out(recipe, sources[recipe.donor]))]


def left_out(recipe: Recipe, donor: Source) -> list[str]:
    """The modules of the donor that the recipe says nothing of, where it names any."""
    named = {part.module for part in recipe.slices}
    if None in named:
        return []
    covered = {name for module in named for name in names_of(donor, module)}
    return [
        module for module, names in modules_of(donor.tensors, donor.config or {}).items() if names[0] not in covered
    ]


def _check_one_stack(part: Slice, source: Source) -> None:
    if part.module is None and part.num_layers is not None:
        modules = modules_of(source.tensors, source.config or {})
        if len(modules) > 1:
            raise ValueError(
                f"{source.name} must be of a model with one stack of layers to pick layers from, got "
                f"{', '.join(modules)}: give the slices of each under recipe.modules"
            )


def _without_layers(recipe: Recipe, part: Slice, sources: Mapping[ModelReference, Source]) -> Slice:
    """Whole, where there are no layers to be picked; mergekit counts none then, or some that have no number."""
    if part.module is None or part.num_layers is None or has_layers(names_of(sources[part.first.model], part.module)):
        return part
    count = sum(other.module == part.module for other in recipe.slices)
    if count > 1:
        raise ValueError(f"recipe.modules.{part.module} must be one slice of a module without layers, got {count}")
    return part.of_whole_models
