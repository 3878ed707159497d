"""Small fits for the tests of surgery."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import Fit, fit

TASKS = ["mnist", "cars", "dtd"]
BATCH = 4
RANK = 3
POOLS = {"mnist": 11, "cars": 3, "dtd": 64}  # several epochs, less than a batch, less than an epoch


def fitted(merged: nn.Module, experts: Any, batches: Any, mode: str, **options: Any) -> Fit:
    defaults = {"rank": RANK, "steps": 6, "batch_size": BATCH, "lr": 0.01, "seed": 5, "progress": False}
    return fit(merged, experts, batches, mode, **{**defaults, **options})


VARIANTS = {
    "v1": ("v1", {}, {}),
    "v2": ("v2", {}, {}),
    "v1-legacy": ("v1", {"legacy_zero_grad": True}, {"zero_steps": 2}),
    "v2-legacy": ("v2", {"legacy_zero_grad": True}, {"zero_steps": 2}),
    "v2-detached": ("v2", {"detach_layers": True}, {"detach": True}),
}


class Samples(torch.utils.data.Dataset):
    """A dataset of (sample, label) that fails at its n-th access."""

    def __init__(self, inputs: Tensor, fails_at: float = math.inf) -> None:
        self.inputs = inputs
        self.left = fails_at

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inputs[number], 7


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def ridge_map(x: Tensor, y: Tensor, weights: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The matrix and the shift: F = G^-1 C, on the first right singular vectors of L^T F where G = L L^T."""
    weights = weights / weights.sum()
    x_mean, y_mean = weights @ x, weights @ y
    u, d, dim = x - x_mean, y - y_mean, x.shape[1]
    gram = (u.T * weights) @ u
    gram += ridge * gram.trace() / dim * torch.eye(dim, dtype=x.dtype)
    matrix = torch.linalg.solve(gram, (u.T * weights) @ d)
    axes = torch.linalg.svd(torch.linalg.cholesky(gram).T @ matrix).Vh[:rank].T
    matrix = matrix @ axes @ axes.T
    return matrix, y_mean - x_mean @ matrix
