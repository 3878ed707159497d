"""Statistics of batch norms."""

from __future__ import annotations

import torch
from torch import nn

from ..modules.device import device_of
from ..modules.frozen import frozen
from ..modules.inputs import run, to_device
from ..modules.pools import Pool
from .build import BatchNorm
from .flows import batches as batches_of


def take_statistics(model: nn.Module, pool: Pool, batch_size: int) -> None:
    """Means and variances of all batch norms are those of these samples."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with frozen(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # the mean over batches
        for inputs in batches_of(pool, batch_size):
            run(model, to_device(inputs, device_of(model)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
