"""Forward hooks that see, and may replace, the features of every site of a model that knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .inputs import batch_size, run
from .outputs import Slot, batch_first, first_token, open_output
from .sites import Sites

Visit = Callable[[int, Tensor], Tensor | None]


class SiteHooks:
    """Shows every site's features to `visit` while `run` runs; `remove` leaves no trace of it.

    `visit` gets the position of the site and its features, [batch, tokens, dim] at blocks (a view, whatever the
    model's layout) and [batch, dim] at the end. What it returns takes their place; None changes nothing.
    """

    def __init__(self, model: nn.Module, sites: Sites, visit: Visit) -> None:
        self._sites = sites
        self._visit = visit
        self._batch = 0
        self._seen: set[int] | None = None  # outside of `run` there is nothing to see
        self._handles = []
        self.token_major: list[bool | None] = []  # per site; None until a batch tells
        for site, name in enumerate(sites.names):
            module = model.get_submodule(name)
            token_major = None
            if site < len(sites.blocks):
                token_major = token_major_of(module) if sites.token_major is None else sites.token_major
            self.token_major.append(token_major)
            self._handles.append(module.register_forward_hook(partial(self._show, site)))

    def run(self, model: nn.Module, *inputs: Any, **options: Any) -> Any:
        """Calls the model, or one around it; every site must take part once."""
        self._batch = batch_size((inputs, options))
        self._seen = set()
        try:
            output = run(model, *inputs, **options)
            for site, name in enumerate(self._sites.names):
                if site not in self._seen:
                    raise ValueError(f"site {name!r} must run once in a forward pass, got none")
            return output
        finally:
            self._seen = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> SiteHooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _show(self, site: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if self._seen is None:
            return None
        if site in self._seen:
            raise ValueError(f"site {self._sites.names[site]!r} must run once in a forward pass, got a second time")
        self._seen.add(site)
        slot = self._features(site, open_output(output, self._sites.names[site]))
        replaced = self._visit(site, slot.tensor)
        return None if replaced is None else slot.put(replaced)

    def _features(self, site: int, slot: Slot) -> Slot:
        is_block, shape = site < len(self._sites.blocks), slot.tensor.shape
        if len(shape) != 3 and (is_block or len(shape) != 2):
            wanted = "[batch, tokens, dim]" if is_block else "[batch, dim] or [batch, tokens, dim]"
            raise ValueError(
                f"features at site {self._sites.names[site]!r} must have shape {wanted}, got {tuple(shape)}"
            )
        if len(shape) == 2:
            return slot
        token_major = self.token_major[site]
        if token_major is None:
            token_major = shape[0] != self._batch and shape[1] == self._batch
            if (shape[0] == self._batch) != (shape[1] == self._batch):
                self.token_major[site] = token_major
        if token_major:
            slot = batch_first(slot)
        return slot if is_block else first_token(slot)


def is_hooked(model: nn.Module) -> bool:
    """Whether any module of the model has hooks of a SiteHooks."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(getattr(getattr(hook, "func", None), "__self__", None), SiteHooks) for hook in hooks)


def token_major_of(block: nn.Module) -> bool | None:
    """Whether its tokens are [tokens, batch, dim], as torch's attention inside says; None where there is none."""
    attentions = (module for module in block.modules() if isinstance(module, nn.MultiheadAttention))
    first = next(attentions, None)
    return None if first is None else not first.batch_first
