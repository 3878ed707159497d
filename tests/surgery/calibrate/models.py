"""Small models to calibrate: a base, experts, and their mean."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from tests.encoders import Encoder, perturbed

TASKS = ["a", "b"]
Family = tuple[nn.Module, nn.Module, dict[str, nn.Module]]


def family(base: nn.Module, scale: float = 0.2) -> Family:
    """merged, base and experts."""
    experts = {task: perturbed(base, seed, scale) for seed, task in enumerate(TASKS)}
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(sum(expert.get_parameter(name) for expert in experts.values()) / 2)
    return merged, base, experts


def encoder_of(block: Callable[[], nn.Module], depth: int = 2, width: int = 8) -> nn.Module:
    """An encoder of float64 with blocks of one kind, the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder(depth=depth, width=width)
        model.blocks = nn.ModuleList(block() for _ in range(depth))
    return model.double().eval()
