"""What goes through the layers of a model in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


@contextmanager
def watched(layers: Iterable[tuple[str, nn.Module]], see: Callable[[Visit], None]) -> Iterator[None]:
    """Shows `see` every call of the layers, while it lasts, under the names they have here."""
    with ExitStack() as hooks:
        for name, layer in layers:
            handle = layer.register_forward_hook(partial(_show, name, see), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _show(
    name: str,
    see: Callable[[Visit], None],
    _: nn.Module,
    args: tuple[Any, ...],
    options: dict[str, Any],
    output: Any,
) -> None:
    given = args[0] if args else next(iter(options.values()), None)
    if isinstance(given, Tensor) and isinstance(output, Tensor):
        see(Visit(name, given, output))


class Visits(ExitStack):
    """Records the calls of some layers, while its `recording` lasts."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._seen: list[Visit] | None = None
        self.enter_context(watched(layers.items(), self._see))

    @contextmanager
    def recording(self) -> Iterator[list[Visit]]:
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def _see(self, visit: Visit) -> None:
        if self._seen is not None:
            self._seen.append(visit)
