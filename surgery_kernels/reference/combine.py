"""A model from task vectors, one coefficient per block."""

from __future__ import annotations

import torch
from torch import Tensor

from .scope import sum_experts


def combine(base: Tensor, task_vectors: Tensor, coefficients: Tensor, block_offsets: Tensor) -> Tensor:
    """base + sum_t coefficients[t, block] * task_vectors[t], rounded once; differentiable in the coefficients."""
    compute = torch.promote_types(base.dtype, torch.float32)
    of_param = coefficients.to(compute).repeat_interleave(block_offsets.diff(), dim=1)
    return (base.to(compute) + sum_experts(task_vectors.to(compute) * of_param)).to(base.dtype)
