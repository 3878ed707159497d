"""Experts as they are given: modules, state dicts, or functions that give either."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..modules.sites import Sites, check_sites

StateDict = Mapping[str, Tensor]
Expert = nn.Module | StateDict | Callable[[], nn.Module | StateDict]


def load_expert(task: str, expert: Expert, merged: nn.Module, sites: Sites) -> nn.Module:
    """A module with the sites of the merged model."""
    if not isinstance(expert, (nn.Module, Mapping)) and callable(expert):
        expert = expert()
    if isinstance(expert, nn.Module):
        check_sites(f"experts[{task!r}]", expert, sites)
        return expert
    if not isinstance(expert, Mapping):
        raise TypeError(f"experts[{task!r}] must be a module or a state dict, got {type(expert).__name__}")
    loaded = copy.deepcopy(merged)
    try:
        loaded.load_state_dict(expert)
    except RuntimeError as error:
        raise ValueError(f"experts[{task!r}] must be a state dict of the merged model, got {error}") from error
    return loaded
