"""What goes through the layers of a model in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
