"""What a model is called with: a tensor, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | dict[str, Tensor]

LABELS = ("label", "labels", "target", "targets")


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


def sample_shape(inputs: Inputs) -> object:
    """The shape of one sample; by name for a mapping."""
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[1:])
    return {name: tuple(value.shape[1:]) for name, value in inputs.items()}


def select(inputs: Inputs, rows: Tensor) -> Inputs:
    return _each(lambda values: values[0][rows], [inputs])


def concatenate(batches: Sequence[Inputs]) -> Inputs:
    return _each(torch.cat, batches)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    return _each(lambda values: values[0].to(device), [inputs])


def _each(function: Callable[[list[Tensor]], Tensor], batches: Sequence[Any]) -> Inputs:
    """`function` of the tensors, or by name of those of the mappings."""
    if isinstance(batches[0], Tensor):
        return function(list(batches))
    return {name: function([batch[name] for batch in batches]) for name in batches[0]}
