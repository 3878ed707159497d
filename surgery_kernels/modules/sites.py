"""Where surgery takes place: modules by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..ops import arguments

MODES = ("v1", "v2")


@dataclass(frozen=True)
class Sites:
    """Names of modules, as in ``model.named_modules()``, whose outputs surgery corrects.

    Args:
        blocks: Modules that return tokens [batch, tokens, dim], in order of depth; none in V1.
        final: The module that returns the final representation [batch, dim]; "" is the model itself.
        token_major: Whether blocks return [tokens, batch, dim]. None: as ``nn.MultiheadAttention`` inside the block
            says, else as the shapes say: `fit` looks at one sample, `attach` at the first batch that is not as long as
            its samples have tokens; False until then.
    """

    blocks: tuple[str, ...] = ()
    final: str = ""
    token_major: bool | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.blocks, self.final)


def find_sites(model: nn.Module, mode: str = "v1") -> Sites:
    """The model's output ("v1"), and before it the output of every block ("v2").

    Blocks are the children of the longest ``nn.ModuleList`` or ``nn.Sequential`` that holds nothing but composed
    modules of one class and lies in no other such list.

    Args:
        model: Any module; nothing is run.
        mode: "v1" or "v2".

    Returns:
        Sites; where they are wrong, make your own: ``Sites(blocks=("layers.0", "layers.1"), final="head")``.

    Raises:
        ValueError: no list of blocks, or two of the same length.
    """
    arguments.check_one_of("mode", mode, MODES)
    if mode == "v1":
        return Sites()
    lists = dict(_block_lists(model, ""))
    longest = max(map(len, lists.values()), default=0)
    found = [name for name, blocks in lists.items() if len(blocks) == longest]
    if len(found) != 1:
        what = " and ".join(map(repr, found)) or "none"
        raise ValueError(f"model must have one longest list of blocks of one class, got {what}: give sites")
    return Sites(blocks=tuple(lists[found[0]]))


def check_sites(argument: str, model: nn.Module, sites: Sites) -> None:
    """Every site is a module of the model, and none is named twice."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in sites.names:
        if name not in modules:
            raise ValueError(f"sites must be names of modules of {argument}, got {name!r}")
        if sites.names.count(name) > 1:
            raise ValueError(f"sites must be different modules, got {name!r} twice")


def _block_lists(module: nn.Module, name: str) -> Iterator[tuple[str, list[str]]]:
    """The outermost lists of blocks: their own names and those of the blocks."""
    children = {f"{name}.{child}" if name else child: layer for child, layer in module.named_children()}
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and _are_blocks(list(children.values())):
        yield name, list(children)
        return
    for child_name, child in children.items():
        yield from _block_lists(child, child_name)


def _are_blocks(modules: list[nn.Module]) -> bool:
    """Two or more of one class, each composed: a list of single layers holds heads or a perceptron."""
    return len(modules) > 1 and len(set(map(type, modules))) == 1 and all(any(m.children()) for m in modules)
