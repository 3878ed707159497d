"""Modules put in the place of others."""

from __future__ import annotations

from torch import nn


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever it is inside the model, under any name."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)
