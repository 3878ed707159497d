"""What surgery compares: the token mean of every block's output, and the final representation."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from .attach import SurgeryModel
from .frozen import device_of, frozen
from .hooks import SiteHooks
from .inputs import Inputs, to_device
from .sites import Sites


class Recorder(ExitStack):
    """Features of a model's sites, batch by batch, as attached adapters correct them; its `with` freezes the model."""

    def __init__(self, model: nn.Module | SurgeryModel, sites: Sites, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._model = model
        self._device = device_of(model)
        self._autocast = autocast
        self._features: list[Tensor] = [torch.empty(0)] * len(sites.names)
        hooked = model.model if isinstance(model, SurgeryModel) else model
        # After those of the adapters, if any: later hooks see what earlier ones did.
        self._hooks = self.enter_context(SiteHooks(hooked, sites, self._record))
        self.enter_context(frozen(model))

    def _record(self, site: int, features: Tensor) -> None:
        self._features[site] = features.mean(dim=1) if features.dim() == 3 else features

    @torch.no_grad()
    def __call__(self, inputs: Inputs, **options: object) -> list[Tensor]:
        """Float32 or float64 on the CPU, site by site.  # [batch, dim] each"""
        with autocast_to(self._autocast, self._device):
            self._hooks.run(self._model, to_device(inputs, self._device), **options)
        return [x.to("cpu", torch.promote_types(x.dtype, torch.float32)) for x in self._features]


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def check_finite(what: str, features: Tensor) -> None:
    if not torch.isfinite(features).all():
        raise ValueError(f"{what} must be finite, got {'NaN' if features.isnan().any() else 'infinity'}")
