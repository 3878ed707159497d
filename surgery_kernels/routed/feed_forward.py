"""Where the feed-forward networks of a transformer are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..modules.sites import find_sites

WIDENS = (1, 2)  # times the hidden width that a layer into it may have: a gate and what it multiplies may be one layer


@dataclass(frozen=True)
class FeedForward:
    """The linear layers of one block's feed-forward network, by their names in the model."""

    block: str
    layers: tuple[str, ...]  # those that widen, then the one that narrows; all the inputs of the first are tokens

    @property
    def module(self) -> str:
        """The module that holds these layers and no other block's: the block itself where it calls them directly."""
        shared = [layer.split(".") for layer in self.layers]
        parts = []
        for names in zip(*(path[:-1] for path in shared), strict=False):
            if len(set(names)) > 1:
                break
            parts.append(names[0])
        return ".".join(parts)


def find_feed_forward(model: nn.Module) -> tuple[FeedForward, ...]:
    """The feed-forward network of every block: the layer that narrows to the tokens' width, and those that feed it.

    Args:
        model: Any module whose blocks `find_sites` finds, with `nn.Linear` layers; nothing is run.

    Raises:
        ValueError: a block has none, or more than one.
    """
    return tuple(_of_block(model, block) for block in find_sites(model, "v2").blocks)


def _of_block(model: nn.Module, block: str) -> FeedForward:
    inside = model.get_submodule(block)
    attention = {id(below) for m in inside.modules() if isinstance(m, nn.MultiheadAttention) for below in m.modules()}
    linear = {
        f"{block}.{name}": layer
        for name, layer in inside.named_modules()
        if isinstance(layer, nn.Linear) and id(layer) not in attention
    }
    found = []
    for name, narrow in linear.items():
        if narrow.in_features <= narrow.out_features:
            continue
        sizes = [(narrow.out_features, times * narrow.in_features) for times in WIDENS]
        wide = [other for other, layer in linear.items() if (layer.in_features, layer.out_features) in sizes]
        if wide:
            found.append(FeedForward(block, (*wide, name)))
    if len(found) != 1:
        what = " and ".join(repr(one.layers[-1]) for one in found) or "none"
        raise ValueError(f"block {block!r} must have one linear layer that narrows what others widened, got {what}")
    return found[0]
