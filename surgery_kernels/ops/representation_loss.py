"""The representation bias as a loss: the L1 distance between two sets of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import arguments

_loss = torch.ops.surgery_kernels.representation_loss.default
_gradient = torch.ops.surgery_kernels.representation_loss_backward.default


def representation_loss(features: Tensor, targets: Tensor) -> Tensor:
    """``mean |features - targets|`` over rows and dim: one L1 bias for each of the leading dimensions.

    The inputs are read once. Where a gradient is wanted, that pass also writes the sign of every difference, one byte
    an element, and backward scales it. Differences are float32 (float64 for float64 inputs), their sum is float64 and
    has the same bits on every instruction set and thread count. Inputs that are not contiguous are copied first.

    Args:
        features: [..., rows, dim], float64, float32, float16 or bfloat16; leading dimensions are tasks, layers or both.
        targets: Like `features`. They are constants: no gradient reaches them, even if they require one. Under
            autocast they may have another of these dtypes; the wider one holds.

    Returns:
        [...] float32, float64 for float64 inputs, differentiable once. The gradient of `features` has their dtype and
        is 0 where both are equal. NaN in a difference reaches its loss and its gradient (where torch's own abs has
        gradient 0). As torch's mean, the loss is NaN where rows or dim is 0; it is empty for empty leading dimensions.

    Raises:
        ValueError, TypeError: the arguments are no tensors of such shapes and dtypes on one device.

    Source: Representation Surgery (arXiv 2402.02705); SurgeryV2 (arXiv 2410.14389).
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor, got {type(features).__name__}")
    if features.dtype not in arguments.DTYPES:
        raise ValueError(f"features must be float64, float32, float16 or bfloat16, got {features.dtype}")
    if features.dim() < 2:
        raise ValueError(f"features must be [..., rows, dim], got shape {tuple(features.shape)}")
    if isinstance(targets, Tensor) and targets.dtype != features.dtype and targets.dtype in arguments.DTYPES:
        features, targets = _autocast(features, targets)
    arguments.check_like("targets", targets, features, "features")
    targets = targets.detach()
    if features.requires_grad and torch.is_grad_enabled():
        return _RepresentationLoss.apply(features, targets)
    return _loss(features, targets, with_signs=False)[0]


def _autocast(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_autocast_enabled(features.device.type):
        return features, targets
    wider = torch.promote_types(features.dtype, targets.dtype)
    return features.to(wider), targets.to(wider)


class _RepresentationLoss(torch.autograd.Function):
    """Costs less per call than torch.library.register_autograd, which small inputs would feel."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, targets: Tensor) -> Tensor:
        loss, signs = _loss(features, targets, with_signs=True)
        ctx.save_for_backward(signs)
        ctx.dtype = features.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return _gradient(grad, signs, ctx.dtype), None


@torch.library.register_fake("surgery_kernels::representation_loss")
def _(features: Tensor, targets: Tensor, with_signs: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(features.dtype, torch.float32)
    signs = features.new_empty(features.shape if with_signs else (0,), dtype=torch.int8)
    return features.new_empty(features.shape[:-2], dtype=wide), signs


@torch.library.register_fake("surgery_kernels::representation_loss_backward")
def _(grad: Tensor, signs: Tensor, dtype: torch.dtype) -> Tensor:
    return signs.new_empty(signs.shape, dtype=dtype)
