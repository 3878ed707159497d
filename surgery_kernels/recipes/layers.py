"""The layers of a model, read off the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

from ..merging.depths import LAYER

# In the names of what comes before the layers, of all architectures that mergekit describes.
BEFORE = ("emb", "wte", "wpe", "shared.", "relative_pe", "rotary_pos", "_pre.", "patch_", "conv1.", "conv2.")
AFTER = ("embed_out.",)


def layers_of(names: Iterable[str], model: str) -> dict[str, int | None]:
    """The layer of every tensor, None for what lies in none.

    Raises:
        ValueError: the layers are not one stack. `model` says whose, for the error.
    """
    found = {name: LAYER.search(name) for name in names}
    stacks = dict.fromkeys(name[: at.start()] for name, at in found.items() if at)
    if len(stacks) != 1:
        got = ", ".join(stacks) or "none"
        raise ValueError(f"{model} must be of a model with one stack of layers to pick layers from, got {got}")
    return {name: int(at[1]) if at else None for name, at in found.items()}


def has_layers(names: Iterable[str]) -> bool:
    """Whether some lie in a stack of layers; where the numbers have gaps, what has none lies between, no layers."""
    stacks: dict[str, set[int]] = {}
    for name in names:
        if found := LAYER.search(name):
            stacks.setdefault(name[: found.start()], set()).add(int(found[1]))
    return any(numbers == set(range(len(numbers))) for numbers in stacks.values())


def in_layer(name: str, layer: int | str) -> str:
    """The name of the same tensor of another layer."""
    return LAYER.sub(f".{layer}.", name, count=1)


def comes_first(name: str) -> bool:
    """Whether a tensor that lies in no layer comes before them all, as embeddings do."""
    return not any(part in name for part in AFTER) and any(part in name for part in BEFORE)
