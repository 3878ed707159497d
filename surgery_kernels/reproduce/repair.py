"""The ways to repair a merged model, which all experiments share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.pools import Batches
from ..surgery import attach, calibrate, fit
from ..surgery.adapters import Rank
from ..surgery.experts import Expert

STEPS = 1000  # per task: 500 rounds of two batches, as in the papers
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Setting:
    """One way to repair a merged model; the defaults are the paper's."""

    mode: str  # "v1" corrects the final representation, "v2" every block too; "calibrate" moves the weights themselves
    rank: Rank = 0  # of adapters
    steps: int = STEPS
    num_samples: int | None = None  # unlabeled samples of each task; None takes all
    on_train: bool = False  # samples of the training split instead of the test split
    solver: str = "gradient"  # or "closed_form", which takes no steps
    residual: bool = False  # targets of "calibrate"
    calibrated: bool = False  # adapters for the model after "calibrate" on the same samples


def repair(
    merged: nn.Module,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Expert],
    samples: Mapping[str, Batches],
    setting: Setting,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    progress: bool | None = False,
    gradient: Mapping[str, Any] = NOTHING,
) -> nn.Module:
    """The merged model with adapters attached, or a calibrated copy of it.

    Args:
        merged: Stays as it is, but for the adapters.
        samples: Unlabeled, those that the setting asks for.
        batch_size: Samples in one pass, where there are no steps.
        gradient: Further options of `fit` where there are.
    """
    common: dict[str, Any] = {"autocast": autocast, "progress": progress}
    if setting.calibrated or setting.mode == "calibrate":
        calibrated = calibrate(
            merged, base, experts, samples, residual=setting.residual, batch_size=batch_size, **common
        )
        merged = copy.deepcopy(merged)
        merged.load_state_dict(calibrated.state)
    if setting.mode == "calibrate":
        return merged
    if setting.solver == "gradient":
        common |= {"steps": setting.steps, **gradient}
    else:
        common |= {"solver": setting.solver, "batch_size": batch_size}
    fitted = fit(merged, experts, samples, setting.mode, rank=setting.rank, **common)
    return attach(merged, fitted.adapters)
