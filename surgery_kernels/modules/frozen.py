"""A model as a constant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """In evaluation mode and without gradients of its parameters; afterwards every module and parameter as before."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module, _ in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter in trainable:
            parameter.requires_grad_(True)
