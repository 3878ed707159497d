"""How far features are from their targets."""

from __future__ import annotations

import torch
from torch import Tensor


def representation_loss(features: Tensor, targets: Tensor) -> Tensor:
    """mean |features - targets| over rows and dim.  # [...]"""
    compute = torch.promote_types(features.dtype, torch.float32)
    return (features.to(compute) - targets.detach().to(compute)).abs().mean(dim=(-2, -1))
