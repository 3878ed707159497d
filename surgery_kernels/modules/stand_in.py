"""Modules that give what they are told instead of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def standing_in(modules: Sequence[nn.Module], give: Callable[[int], Any]) -> Iterator[None]:
    """A call of one of the modules returns ``give(its position)`` at once; its hooks see that."""
    own = [vars(module).get("forward") for module in modules]
    try:
        for i, module in enumerate(modules):
            module.forward = lambda *_, i=i, **__: give(i)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
