"""Where in a model a tensor lies, read off its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

# The first number of "model.layers.7.mlp.experts.3.up_proj.weight" is the layer; what is left of it names the stack.
LAYER = re.compile(r"\.(\d+)\.")
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def num_layers(config: Mapping[str, Any]) -> int | None:
    """The number of layers in a config.json, None where it names none."""
    for key in NUM_LAYERS_KEYS:
        if isinstance(config.get(key), int) and config[key] > 0:
            return config[key]
    return None


def depths(names: Iterable[str], num_layers: int | None = None) -> dict[str, float]:
    """``t = layer / (num_layers - 1)`` of every tensor, which gradients over the layers are read at.

    Args:
        names: Of all tensors of a checkpoint.
        num_layers: 1 or more: of a model that is one stack of layers, where layers beyond it (for the prediction of
            further tokens) count as the last. None, and always in a model of several stacks (encoder and decoder, text
            and vision): each has as many as its names tell.

    Returns:
        A number in [0, 1] for every name, in their order: 1 in a stack of one layer, and 0 for what is in no layer:
        embeddings, but also the final norm and the output head.

    Source: mergekit 0.1.5, for the architectures it knows and for those whose layers it infers from the names.
    """
    layers: dict[str, tuple[str, int] | None] = {}
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        if found := LAYER.search(name):
            stack, layer = name[: found.start()], int(found[1])
            layers[name] = stack, layer
            counts[stack] = max(counts[stack], layer + 1)
        else:
            layers[name] = None
    if num_layers is not None and len(counts) == 1:
        counts = dict.fromkeys(counts, num_layers)
    return {name: 0.0 if at is None else _depth(at[1], counts[at[0]]) for name, at in layers.items()}


def _depth(layer: int, num_layers: int) -> float:
    return 1.0 if num_layers == 1 else min(layer / (num_layers - 1), 1.0)
