"""What of FusionBench stands aside for our ops, and how it is as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

OURS: dict[tuple[Any, str], Any] = {}  # by class or module, and name
STOCK: dict[tuple[Any, str], Any] = {}


def stands_in(owner: Any, name: str = "run") -> Callable[[Function], Function]:
    """Of a function with the arguments of FusionBench's, where that is looked up."""

    def register(ours: Function) -> Function:
        STOCK[owner, name] = vars(owner)[name]
        OURS[owner, name] = ours
        return ours

    return register


def stock(owner: Any, name: str = "run") -> Callable[..., Any]:
    """FusionBench's own, for what our ops do not take."""
    return STOCK[owner, name]


def swap() -> None:
    for (owner, name), ours in OURS.items():
        setattr(owner, name, ours)


@contextmanager
def restored() -> Iterator[None]:
    """After the block all is as it was before it, swapped or not."""
    before = [(owner, name, vars(owner)[name]) for owner, name in OURS]
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
