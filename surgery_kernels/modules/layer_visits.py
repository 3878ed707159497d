"""What goes through the known layers of a model in a pass: of nn.MultiheadAttention also what it does not call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .layers import Layer, projections
from .visits import Visit, watched

See = Callable[[Visit], None]


class LayerVisits(ExitStack):
    """Records the calls of some layers, while its `recording` lasts."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        """`layers`: of a model like this one."""
        super().__init__()
        self._seen: list[Visit] | None = None
        attentions = dict.fromkeys(
            name.rpartition(".")[0] for name, layer in layers.items() if isinstance(layer.module, nn.MultiheadAttention)
        )
        for name in attentions:
            self.enter_context(_attention_watched(name, model.get_submodule(name), self._see))
        called = [name for name in layers if name.rpartition(".")[0] not in attentions]
        self.enter_context(watched([(name, model.get_submodule(name)) for name in called], self._see))

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


@contextmanager
def _attention_watched(name: str, attention: nn.Module, see: See) -> Iterator[None]:
    """Shows the inputs of queries, keys and values, with what is made of them; and what the last projection gets."""
    given: tuple[Tensor, ...] = ()
    own = False  # the pass that finds what goes into the last projection

    def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
        nonlocal given
        if own:
            return None
        given = _inputs(args, options)
        if not torch.is_grad_enabled():
            return None
        # of their own, so that it can be seen which rows each is read at
        given = tuple(x.view_as(x) for x in given)
        named = dict(zip(("query", "key", "value"), given, strict=True))
        rest = {key: value for key, value in options.items() if key not in named}
        return (*given, *args[3:]), rest

    def after(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        nonlocal own
        if own:
            return
        for layer, x in zip(projections(name), given, strict=True):
            see(Visit(layer, x, x))
        own = True
        try:
            with torch.no_grad():
                attended = functional_call(module, _without_projection(module), args, options)[0]
        finally:
            own = False
        see(Visit(f"{name}.out_proj", attended, output[0]))

    with ExitStack() as hooks:
        for handle in (
            attention.register_forward_pre_hook(before, with_kwargs=True),
            attention.register_forward_hook(after, with_kwargs=True),
        ):
            hooks.callback(handle.remove)
        yield


def _inputs(args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    names = ("query", "key", "value")
    return tuple(args[i] if i < len(args) else options[name] for i, name in enumerate(names))


def _without_projection(module: nn.Module) -> dict[str, Tensor]:
    """With these in place of its own, attention returns what it else projects."""
    weight = module.get_parameter("out_proj.weight")
    replaced = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    if getattr(module.get_submodule("out_proj"), "bias", None) is not None:
        replaced["out_proj.bias"] = torch.zeros_like(weight[0])
    return replaced
