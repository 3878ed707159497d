"""Tensors as the toolkits hand them over: which of them the ops take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops import arguments

# The toolkits let NaN through to the result.
NONFINITE = "propagate"


def next_seed() -> int:
    """Of a counter, from torch's own generator: `torch.manual_seed` decides it."""
    return int(torch.randint((1 << 63) - 1, ()))


def mergeable(tensors: Sequence[Tensor]) -> bool:
    """Whether the ops take them; where not, the toolkit's own code runs and says what it has to say."""
    if not tensors:
        return False
    first = tensors[0]
    return (
        first.numel() > 0
        and first.dtype in arguments.DTYPES
        and all(
            type(tensor) in (Tensor, Parameter)
            and tensor.device == first.device
            and tensor.device.type in ("cpu", "cuda")
            and tensor.layout == torch.strided
            and tensor.dtype == first.dtype
            and tensor.shape == first.shape
            and not (tensor.requires_grad and torch.is_grad_enabled())  # the ops carry no gradient
            for tensor in tensors
        )
    )
