"""Pools of small models."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from tests.untied import untied


class Untied(nn.Module):
    """Without buffers and shared weights, which DARE and ModelStock of FusionBench do not manage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs).tanh())


def of_untied(num_tasks: int, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    pretrained = Untied().to(dtype)
    models = {"_pretrained_": pretrained} | {f"task_{t}": deepcopy(pretrained) for t in range(num_tasks)}
    for name in pretrained.state_dict():
        base, experts = untied(pretrained.state_dict()[name].shape, num_tasks, dtype)
        for model, value in zip(models.values(), (base, *experts), strict=True):
            model.state_dict()[name].copy_(value)
    return models


def lazy(models: dict[str, nn.Module], folder: Path) -> Any:
    """A pool that reads every tensor from disk when it is asked for."""
    from fusion_bench import LazyStateDict
    from fusion_bench.modelpool import BaseModelPool

    class LazyPool(BaseModelPool):
        def load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
            with torch.device("meta"):
                return LazyStateDict(str(folder / name), meta_module=type(models[name])())

    for name, model in models.items():
        (folder / name).mkdir()
        save_model(model, str(folder / name / "model.safetensors"))
    return LazyPool(models)
