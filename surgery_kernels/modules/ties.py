"""Parameters that several layers share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .layers import Layer
from .sites import Sites


def check_ties(model: nn.Module, sites: Sites) -> None:
    """Blocks are solved for one after the other: what two of them share has no place in that.

    Raises:
        ValueError: a block runs twice, or two blocks share a parameter.
    """
    owners: dict[int, tuple[str, str]] = {}
    for block in sites.blocks:
        for name, parameter in model.get_submodule(block).named_parameters():
            other, its_name = owners.setdefault(id(parameter), (block, f"{block}.{name}"))
            if other != block:
                raise ValueError(
                    f"merged must not share parameters between blocks, got {its_name!r} that is '{block}.{name}' too"
                )


def first_of_tied(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """For every layer that may be solved for the first with its parameters; not for layers that share them, or a part
    of them, with something else."""
    elsewhere: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            elsewhere.setdefault(id(parameter), set()).add(f"{path}.{name}".strip("."))
    owners: dict[tuple[object, ...], str] = {}
    names: dict[str, set[str]] = {}
    first = {}
    for name, layer in layers.items():
        key = tuple((id(model.get_parameter(part.name)), part.view) for part in layer.parts)
        first[name] = owner = owners.setdefault(key, name)
        names.setdefault(owner, set()).update(part.name for part in layer.parts)
    known = {owner: _all_names(model, layers[owner], elsewhere) <= names[owner] for owner in names}
    return {name: owner for name, owner in first.items() if known[owner]}


def _all_names(model: nn.Module, layer: Layer, elsewhere: Mapping[int, set[str]]) -> set[str]:
    return {name for part in layer.parts for name in elsewhere[id(model.get_parameter(part.name))]}
