"""The calls whose kernels are compiled ahead of time: one module per stem with a function `launches`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A call of a host function on CPU tensors. It is made at once, with launches that compile and do not run."""

    name: str  # unique within its stem
    call: Callable[[], object]
    wide: tuple[str, ...] = ()  # kernels that must load 16 bytes at a time in their hot loops
