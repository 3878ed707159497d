"""One thread, and a merged model, its experts and their samples, small enough for plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.encoders import Encoder, perturbed, samples
from tests.fits import POOLS, TASKS


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """On models this small, threads wait for each other longer than they work."""
    torch.set_num_threads(1)


@pytest.fixture
def merged() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(depth=3).double()


@pytest.fixture
def experts(merged: nn.Module) -> dict[str, nn.Module]:
    return {task: perturbed(merged, seed) for seed, task in enumerate(TASKS)}


@pytest.fixture
def batches() -> dict[str, Tensor]:
    return {task: samples(size, 5, 3, seed=size).double() for task, size in POOLS.items()}
