"""What a model is called with: a tensor, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | dict[str, Tensor]

LABELS = ("label", "labels", "target", "targets")
MASK = "attention_mask"


def run(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Calls the model; a single mapping becomes its keyword arguments."""
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return model(**inputs[0], **options)
    return model(*inputs, **options)


def batch_size(inputs: object) -> int:
    """The length of the first tensor, the number of samples; 0 where there is none."""
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.dim() else 0
    items = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return next(filter(None, map(batch_size, items)), 0)


def without_labels(batch: object, argument: str) -> Inputs:
    """The inputs of a batch: a tensor, the first item of a tuple, or the tensors of a mapping but its labels."""
    if isinstance(batch, (tuple, list)) and batch:
        if len(batch) > 1 and _is_mask_of(batch[0], batch[1]):
            raise ValueError(
                f"{argument} must be mappings where the model takes a mask beside its tokens, got a tuple of both"
            )
        return without_labels(batch[0], argument)
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name not in LABELS and isinstance(value, Tensor)}
        if len({len(value) if value.dim() else 0 for value in inputs.values()}) > 1:
            shapes = {name: tuple(value.shape) for name, value in inputs.items()}
            raise ValueError(f"{argument} must be tensors with a row per sample each, got {shapes}")
        if inputs:
            return inputs
    raise TypeError(
        f"{argument} must be tensors, tuples that start with one or mappings of tensors, got {type(batch).__name__}"
    )


def _is_mask_of(tokens: object, other: object) -> bool:
    """Whether it is 0 or 1 for every token: labels are not."""
    if not isinstance(tokens, Tensor) or not isinstance(other, Tensor):
        return False
    if tokens.is_floating_point() or other.is_floating_point() or tokens.dim() < 2 or tokens.shape != other.shape:
        return False
    return bool(((other == 0) | (other == 1)).all())


def sample_shape(inputs: Inputs) -> object:
    """The shape of one sample; by name for a mapping."""
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[1:])
    return {name: tuple(value.shape[1:]) for name, value in inputs.items()}


def select(inputs: Inputs, rows: Tensor) -> Inputs:
    return _each(lambda values: values[0][rows], [inputs])


def concatenate(batches: Sequence[Inputs]) -> Inputs:
    return _each(torch.cat, batches)


def padded(batches: list[Any]) -> list[Any]:
    """Batches of tokens with a mask, each as long as its own longest sample, brought to one length.

    What is added is masked, on the side where they are padded already (else the right) and with what they are padded
    with (else 0). Batches of one length, and others than such, are given back as they are.
    """
    masks = [batch[MASK] for batch in batches if isinstance(batch, dict) and MASK in batch]
    if len(masks) < len(batches) or len({tuple(batch) for batch in batches}) > 1:
        return batches
    if any(mask.dim() != 2 for mask in masks) or len({mask.shape[1] for mask in masks}) < 2:
        return batches
    longest = max(mask.shape[1] for mask in masks)
    on_the_left = any(bool((mask[:, :1] == 0).any()) for mask in masks)

    def brought(values: list[Tensor]) -> list[Tensor]:
        pairs = list(zip(values, masks, strict=True))
        if any(value.shape[:2] != mask.shape for value, mask in pairs):
            return values
        masked = torch.cat([value[mask == 0] for value, mask in pairs])
        fill = masked.flatten()[0].item() if len(masked) else 0
        return [pad(value, longest - value.shape[1], fill) for value in values]

    def pad(value: Tensor, count: int, fill: float) -> Tensor:
        ends = (count, 0) if on_the_left else (0, count)
        return nn.functional.pad(value, (*(0, 0) * (value.dim() - 2), *ends), value=fill)

    of_name = {name: brought([batch[name] for batch in batches]) for name in batches[0]}
    return [dict(zip(of_name, values, strict=True)) for values in zip(*of_name.values(), strict=True)]


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    return _each(lambda values: values[0].to(device), [inputs])


def _each(function: Callable[[list[Tensor]], Tensor], batches: Sequence[Any]) -> Inputs:
    """`function` of the tensors, or by name of those of the mappings."""
    if isinstance(batches[0], Tensor):
        return function(list(batches))
    return {name: function([batch[name] for batch in batches]) for name in batches[0]}
