"""What surgery compares: every block's output or its token mean, and the final representation."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..modules.device import autocast_to, device_of
from ..modules.frozen import frozen
from ..modules.hooks import SiteHooks
from ..modules.inputs import Inputs, batch_size, select, to_device
from ..modules.sites import Sites
from .attach import SurgeryModel


class Recorder(ExitStack):
    """Features of a model's sites, batch by batch, as attached adapters correct them; its `with` freezes the model.

    Of blocks the means over tokens, unless `token_mean` is False.
    """

    def __init__(
        self,
        model: nn.Module | SurgeryModel,
        sites: Sites,
        autocast: torch.dtype | None = None,
        *,
        token_mean: bool = True,
    ) -> None:
        super().__init__()
        self._model = model
        self._device = device_of(model)
        self._autocast = autocast
        self._token_mean = token_mean
        self._features: list[Tensor] = [torch.empty(0)] * len(sites.names)
        hooked = model.model if isinstance(model, SurgeryModel) else model
        # After those of the adapters, if any: later hooks see what earlier ones did.
        self._hooks = self.enter_context(SiteHooks(hooked, sites, self._record))
        self._is_first = None in self._hooks.token_major
        self.enter_context(frozen(model))

    @property
    def token_major(self) -> bool | None:
        """Of the blocks, as the batches so far tell; None if they do not, or differ."""
        layouts = set(self._hooks.token_major[:-1])
        return layouts.pop() if len(layouts) == 1 else None

    def _record(self, site: int, features: Tensor) -> None:
        self._features[site] = features.mean(dim=1) if features.dim() == 3 and self._token_mean else features

    @torch.no_grad()
    def __call__(self, inputs: Inputs, **options: object) -> list[Tensor]:
        """Float32 or float64 on the CPU, site by site.  # [batch, dim] each, or at blocks [batch, tokens, dim]"""
        if self._is_first and batch_size(inputs) > 1:
            # One sample tells the layout, unless it has one token; a batch as long as its tokens would not.
            self(select(inputs, torch.zeros(1, dtype=torch.int64)), **options)
        self._is_first = False
        with autocast_to(self._autocast, self._device):
            self._hooks.run(self._model, to_device(inputs, self._device), **options)
        return [x.to("cpu", torch.promote_types(x.dtype, torch.float32)) for x in self._features]


def check_finite(what: str, features: Tensor) -> None:
    if not torch.isfinite(features).all():
        raise ValueError(f"{what} must be finite, got {'NaN' if features.isnan().any() else 'infinity'}")
