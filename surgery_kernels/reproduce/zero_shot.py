"""Classes by the cosine of features and prototypes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cosines(features: Tensor, head: Tensor) -> Tensor:
    """Of features [batch, num_features] and prototypes, which a saved head may scale: [batch, classes]."""
    return F.normalize(features.float(), dim=-1) @ head.T
