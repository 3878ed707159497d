"""The merging method of a recipe, with the numbers of one tensor."""

from __future__ import annotations

from ..merging import Average, Ties
from ..recipes.parameters import TensorParameters


def method_of(name: str, parameters: TensorParameters, nonfinite: str) -> Average | Ties:
    """What mergekit computes by the method `name` of a recipe."""
    weights = list(parameters.weights)
    if name == "linear":
        return Average(weights=weights, normalize=parameters.normalize, nonfinite=nonfinite)
    return Ties(
        density=list(parameters.densities),
        lam=parameters.lam,
        weights=weights,
        semantics="mergekit",
        elect="sum" if name == "ties" else "none",
        normalize=parameters.normalize,
        rescale=parameters.rescale,
        nonfinite=nonfinite,
    )
