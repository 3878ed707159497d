"""How far a merged model's features are from an expert's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..modules.inputs import Inputs
from ..modules.pools import Batches, Pool, pool_of
from ..modules.sites import Sites, check_sites, find_sites
from ..ops import arguments
from .attach import SurgeryModel
from .features import Recorder, check_finite


def representation_bias(
    merged: nn.Module,
    expert: nn.Module,
    batches: Batches,
    sites: Sites | None = None,
    task: str | int | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """``mean |features of merged - features of expert|`` over samples and width, site by site.

    At blocks the features are token means, as SurgeryV2 compares them.

    Args:
        merged: Any module, or one with adapters attached (`SurgeryModel`).
        expert: A module with the same sites.
        batches: Samples of the expert's task, in any form that `fit` takes.
        sites: By default those of the attached adapters if they include blocks, else every block of the model and its
            final representation.
        task: Whose adapters; for a `SurgeryModel` only.
        batch_size: Samples in one forward pass, 1 or more.
        num_workers: Processes that read a dataset.

    Returns:
        Site name -> bias, in order of depth.

    Raises:
        ValueError, TypeError: an argument is outside its range, the models differ in width, or features are not finite.

    Source: Representation Surgery (arXiv 2402.02705); SurgeryV2 (arXiv 2410.14389).
    """
    sites = _sites("merged", merged, sites, task)
    check_sites("expert", expert, sites)
    pool = pool_of("batches", batches, num_workers)
    total = torch.zeros(len(sites.names), dtype=torch.float64)
    with Recorder(merged, sites) as of_merged, Recorder(expert, sites) as of_expert:
        for inputs in _in_order(pool, batch_size):
            pairs = zip(sites.names, of_merged(inputs, **_task(task)), of_expert(inputs), strict=True)
            for i, (site, features, targets) in enumerate(pairs):
                if features.shape != targets.shape:
                    raise ValueError(
                        f"features of expert at site {site!r} must have shape {tuple(features.shape)}, as in merged, "
                        f"got {tuple(targets.shape)}"
                    )
                check_finite(f"features of merged at site {site!r}", features)
                check_finite(f"features of expert at site {site!r}", targets)
                total[i] += (features - targets).abs().mean(dim=1).sum(dtype=torch.float64)
    return dict(zip(sites.names, (total / len(pool)).tolist(), strict=True))


def collect_features(
    model: nn.Module,
    batches: Batches,
    sites: Sites | None = None,
    task: str | int | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, Tensor]:
    """What `representation_bias` compares, sample by sample: [samples, dim] per site, on the CPU.

    Args, Raises: as in `representation_bias`.
    """
    sites = _sites("model", model, sites, task)
    pool = pool_of("batches", batches, num_workers)
    with Recorder(model, sites) as record:
        rows = [record(inputs, **_task(task)) for inputs in _in_order(pool, batch_size)]
    return dict(zip(sites.names, map(torch.cat, zip(*rows, strict=True)), strict=True))


def _in_order(pool: Pool, batch_size: int) -> Iterator[Inputs]:
    arguments.check_count("batch_size", batch_size)
    return pool.stream(torch.arange(len(pool)).split(batch_size))


def _sites(argument: str, model: nn.Module, sites: Sites | None, task: str | int | None) -> Sites:
    attached = isinstance(model, SurgeryModel)
    if attached != (task is not None):
        wanted = "given for a model with adapters" if attached else "None for a model without adapters"
        raise ValueError(f"task must be {wanted}, got {task!r}")
    hooked = model.model if isinstance(model, SurgeryModel) else model
    if sites is not None:
        check_sites(argument, hooked, sites)
        return sites
    if isinstance(model, SurgeryModel) and model.sites.blocks:
        return model.sites
    return find_sites(hooked, "v2")


def _task(task: str | int | None) -> dict[str, str | int]:
    return {} if task is None else {"task": task}
