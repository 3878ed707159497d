"""Surgery on a model as it runs: adapters attached by hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..modules.hooks import SiteHooks, is_hooked
from ..modules.sites import Sites, check_sites
from .adapters import SurgeryAdapters, Task


class SurgeryModel(nn.Module):
    """A model and the adapters attached to it; made by `attach`.

    ``surgery(images, task="mnist")`` runs the model with the adapters of that task; ``task=3`` takes a number,
    ``task=[...]`` or an integer tensor [batch] one task per sample, in any order. Other arguments are the model's; a
    single mapping is taken as its keyword arguments. A direct call of the model runs it without adapters. One call at a
    time: threads need a copy each.
    """

    def __init__(self, model: nn.Module, adapters: SurgeryAdapters, sites: Sites) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.sites = sites
        self._hooks: SiteHooks | None = SiteHooks(model, sites, self._correct)
        self._tasks: slice | Tensor = slice(None)  # of the pass that runs

    def forward(self, *inputs: Any, task: Task, **options: Any) -> Any:
        if self._hooks is None:
            raise RuntimeError("surgery must be attached, got a detached one: call attach again")
        index = self.adapters.task_index(task)
        self._tasks = slice(index, index + 1) if isinstance(index, int) else index
        return self._hooks.run(self.model, *inputs, **options)

    def _correct(self, site: int, features: Tensor) -> Tensor:
        name, width = self.sites.names[site], list(self.adapters.widths.values())[site]
        if features.shape[-1] != width:
            raise ValueError(f"features at site {name!r} must have width {width}, got {features.shape[-1]}")
        if isinstance(self._tasks, Tensor):
            if len(self._tasks) != len(features):
                raise ValueError(f"task must be one per sample ({len(features)}), got {len(self._tasks)}")
            self._tasks = self._tasks.to(features.device)
        return self.adapters(site, features, self._tasks)

    def detach(self) -> nn.Module:
        """Removes the hooks; gives the model, as it was before `attach`."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        return self.model

    def __enter__(self) -> SurgeryModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(model: nn.Module, adapters: SurgeryAdapters, sites: Sites | None = None) -> SurgeryModel:
    """Hooks the adapters into a model that need not know of them; no module of it is edited.

    Blocks may return tokens as a tensor or as the first item of a tuple, batch first or token-major. The model may
    return its representation as a tensor [batch, dim], as tokens (the first is taken), as the first item of a tuple
    or in a mapping such as Hugging Face's ModelOutput: image_embeds, text_embeds, pooler_output, else the first token
    of last_hidden_state.

    Args:
        model: Any module with the adapters' sites.
        adapters: As fitted or loaded.
        sites: Only where names or layout must be told; by default the adapters' own names, the last one final.

    Returns:
        The wrapper to call; also a context manager that detaches at its end.

    Raises:
        ValueError: a site is no module of the model or not one of the adapters, or adapters are attached already.
    """
    if sites is None:
        sites = Sites(blocks=adapters.sites[:-1], final=adapters.sites[-1])
    if sites.names != adapters.sites:
        raise ValueError(f"sites must be those of the adapters, {list(adapters.sites)}, got {list(sites.names)}")
    if is_hooked(model):
        raise ValueError("model must be without adapters, got one with adapters attached: detach them first")
    check_sites("model", model, sites)
    return SurgeryModel(model, adapters, sites)
