"""Training adapters on cached features, one task after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .representation_loss import representation_loss
from .surgery_adapter import correct


def surgery_train(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    down: Tensor,
    up: Tensor,
    down_moments: Tensor,
    up_moments: Tensor,
    indices: Tensor,
    *,
    step: int = 0,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    zero_grad_steps: int = 0,
) -> Tensor:
    """The loop that the fused training replaces: autograd and Adam, one task after another.  # [steps, num_tasks]"""
    losses = torch.zeros(indices.shape[:2], dtype=torch.promote_types(down.dtype, torch.float32))
    for s, batches in enumerate(indices):
        for t, batch in enumerate(batches):
            parameters = [down[t : t + 1].clone().requires_grad_(), up[t : t + 1].clone().requires_grad_()]
            corrected = correct(features[t][batch].to(down.dtype)[None], *parameters)
            loss = representation_loss(corrected, targets[t][batch].to(down.dtype)[None])
            gradients = torch.autograd.grad(loss.sum(), parameters)
            losses[s, t] = loss[0].detach()
            for value, moments, gradient in zip((down[t], up[t]), (down_moments, up_moments), gradients, strict=True):
                for i in range(1 + zero_grad_steps):
                    adam(value, moments[:, t], gradient[0] * (i == 0), step + i + 1, lr, betas, eps)
        step += 1 + zero_grad_steps
    return losses


def adam(
    value: Tensor,
    moments: Tensor,
    gradient: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Algorithm 1 of arXiv 1412.6980, in place; moments [2, ...]; `step` counts from 1."""
    first, second = moments.unbind()
    first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    corrected = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
    value.sub_(lr * corrected[0] / (corrected[1].sqrt() + eps))
