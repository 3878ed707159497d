"""TIES as its paper states it, in eager PyTorch: what the native op is checked and timed against."""

import torch
from torch import Tensor


def ties_merge(base: Tensor, experts: Tensor, density: float, lam: float) -> Tensor:
    """Disjoint sum of flattened models: base [num_params], experts [num_tasks, num_params] to merged [num_params]."""
    task_vectors = experts - base
    magnitudes = task_vectors.abs()
    num_params = base.numel()
    thresholds = magnitudes.kthvalue(num_params - int(density * num_params), dim=1, keepdim=True).values
    trimmed = task_vectors * (magnitudes >= thresholds)

    elected = trimmed.sum(0).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)
    agrees = torch.where(elected > 0, trimmed > 0, trimmed < 0)
    return base + lam * (trimmed * agrees).sum(0)
