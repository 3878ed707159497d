"""Whether slices of several models make one model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..recipes import Recipe
from ..recipes.layers import in_layer, layers_of
from ..recipes.model_reference import ModelReference
from .modules import names_of
from .reading.source import Source
from .vocabulary.layers import vocabulary_of

Shapes = dict[str, set[tuple[int, ...]]]


def check_one_model(recipe: Recipe, sources: Mapping[ModelReference, Source]) -> None:
    """Raises ValueError where the slices take after models of other tensors or widths than the first one's."""
    for module, origins in recipe.origins.items():
        models = dict.fromkeys(model for model, _ in origins)
        if len(models) > 1:
            _check_alike([sources[model] for model in models], module, by_token=recipe.tokenizer is not None)


def _check_alike(models: Sequence[Source], module: str | None, *, by_token: bool) -> None:
    first, *others = models
    wanted = _shapes(first, module, by_token)
    for other in others:
        got = _shapes(other, module, by_token)
        for name in sorted(wanted.keys() ^ got.keys()):
            owner = first if name in wanted else other
            raise ValueError(
                f"recipe.slices must be of models with the same tensors, got {name!r} in {owner.name} alone"
            )
        for name, shapes in wanted.items():
            if not shapes & got[name]:
                ours, theirs = (list(min(of)) for of in (shapes, got[name]))
                raise ValueError(
                    f"recipe.slices must be of models whose tensors have the same shapes, got {ours} of {name!r} in "
                    f"{first.name} and {theirs} in {other.name}"
                )


def _shapes(source: Source, module: str | None, by_token: bool) -> Shapes:
    """Of the vocabulary and the tensors in layers, by names that leave the layer open; some models have several.

    Where rows follow the tokens (`by_token`) vocabularies have the shape of the result.
    """
    shapes: Shapes = defaultdict(set)
    vocabulary = vocabulary_of(source)
    for name, layer in layers_of(names_of(source, module), source.name).items():
        shape = source.tensors[name].shape
        if layer is not None:
            shapes[in_layer(name, "*")].add(shape)
        elif name in vocabulary.axes or name in vocabulary.unknown:
            axis = vocabulary.axes.get(name, 0)
            shapes[name].add((*shape[:axis], *shape[axis + 1 :]) if by_token else shape)
    return shapes
