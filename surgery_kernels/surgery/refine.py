"""Steps of the gradient from the closed form on, kept for each task where they helped."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import SurgeryAdapters
from .gradient.solver import Gradient
from .measure import Measure
from .run import Run


@dataclass(frozen=True)
class Refined:
    adapters: SurgeryAdapters  # of every task the better ones
    kept: tuple[str, ...]  # "closed_form" or "gradient" for every task
    bias: Tensor  # before every step  # [steps, num_tasks, num_sites]


def refine(run: Run, start: SurgeryAdapters, gradient: Gradient, measure: Measure) -> Refined:
    """Better is the smaller sum over sites of the bias, which is what the steps lower, as `measure` finds it."""
    moved, bias = gradient.solve(run, copy.deepcopy(start))
    # where they are not finite, steps did not help
    better = measure.of(moved).sum(1) < measure.of(start).sum(1)  # [num_tasks]
    with torch.no_grad():
        for ours, theirs in zip(moved.parameters(), start.parameters(), strict=True):
            ours[~better] = theirs[~better]
    return Refined(moved, tuple("gradient" if helped else "closed_form" for helped in better.tolist()), bias)
