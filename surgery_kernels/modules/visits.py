"""What goes through the layers of a model in a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Visit:
    """One call of a layer."""

    name: str
    inputs: Tensor
    output: Tensor


class Visits(ExitStack):
    """Records the calls of some layers, while its `recording` lasts."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._seen: list[Visit] | None = None
        for name, layer in layers.items():
            self.callback(layer.register_forward_hook(partial(self._see, name)).remove)

    @contextmanager
    def recording(self) -> Iterator[list[Visit]]:
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def _see(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._seen is not None and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self._seen.append(Visit(name, args[0], output))
