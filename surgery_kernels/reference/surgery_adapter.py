"""The adapter of Surgery and SurgeryV2."""

from __future__ import annotations

import torch
from torch import Tensor


def surgery_adapter(
    features: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    task_index: Tensor | None = None,
    token_mean: bool = False,
    bias: Tensor | None = None,
    activation: str = "relu",
) -> Tensor | tuple[Tensor, Tensor]:
    """features - relu(features down^T) up^T - bias with each task's own adapter; differentiable by autograd."""
    compute = torch.promote_types(features.dtype, torch.float32)
    down, up, bias = down.to(compute), up.to(compute), None if bias is None else bias.to(compute)
    if task_index is not None:
        down, up, bias = down[task_index], up[task_index], None if bias is None else bias[task_index]
    corrected = correct(features.to(compute), down, up, activation=activation)
    if bias is not None:
        corrected = corrected - bias.view(len(bias), *(1,) * (corrected.dim() - 2), bias.shape[-1])
    if token_mean:
        return corrected.to(features.dtype), corrected.mean(dim=-2).to(features.dtype)
    return corrected.to(features.dtype)


def correct(features: Tensor, down: Tensor, up: Tensor, *, activation: str = "relu") -> Tensor:
    """features [n, ..., dim], each of the first dimension with its own down [n, rank, dim] and up [n, dim, rank]."""
    hidden = torch.einsum("n...d,nrd->n...r", features, down)
    hidden = hidden.relu() if activation == "relu" else hidden
    return features - torch.einsum("n...r,ndr->n...d", hidden, up)
