"""The features inside whatever a module returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# In this order: what the model projects or pools is its representation, not the tokens it comes from.
KEYS = ("image_embeds", "text_embeds", "image_features", "text_features", "pooler_output", "last_hidden_state")


@dataclass(frozen=True)
class Slot:
    """A tensor in an output, and how the same output looks with another tensor in its place."""

    tensor: Tensor
    put: Callable[[Tensor], Any]


def open_output(output: Any, site: str) -> Slot:
    """The tensor of a tensor, the first item of a tuple or the representation of a mapping such as ModelOutput."""
    if isinstance(output, Tensor):
        return Slot(output, lambda features: features)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return Slot(output[0], partial(_with_first, output))
    if isinstance(output, Mapping):
        for key in KEYS:
            if isinstance(output.get(key), Tensor):
                return Slot(output[key], partial(_with_item, output, key))
    raise TypeError(
        f"output at site {site!r} must be a tensor, a tuple that starts with one or a mapping with one of "
        f"{', '.join(KEYS)}, got {type(output).__name__}"
    )


def logits_of(outputs: Any) -> Any:
    """Of a classifier's output: itself, or its `logits` where it is a mapping with them."""
    return outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else outputs


def batch_first(slot: Slot) -> Slot:
    """Token-major [tokens, batch, dim] as a view [batch, tokens, dim]."""
    return Slot(slot.tensor.transpose(0, 1), lambda features: slot.put(features.transpose(0, 1)))


def first_token(slot: Slot) -> Slot:
    """The class token [batch, dim] of tokens [batch, tokens, dim]."""
    others = slot.tensor[:, 1:]
    return Slot(slot.tensor[:, 0], lambda features: slot.put(torch.cat([features.unsqueeze(1), others], dim=1)))


def _with_first(output: tuple[Any, ...], features: Tensor) -> tuple[Any, ...]:
    items = (features, *output[1:])
    return type(output)(*items) if hasattr(output, "_fields") else items  # a named tuple keeps its names


def _with_item(output: Mapping[str, Any], key: str, features: Tensor) -> Mapping[str, Any]:
    """A new output: the one the model made may be shared with its caller or its own hooks."""
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{key: features})
    return type(output)({**output, key: features})  # type: ignore[call-arg]  # dict and its relatives
