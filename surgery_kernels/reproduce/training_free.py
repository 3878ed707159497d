"""Every training-free method on the experts of an experiment: accuracy, time and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..merging import METHODS, merge_state_dicts
from .methods import DENSITY, LAM
from .report import average

StateDict = dict[str, Tensor]

OF_ONE = ("passthrough", "wise_ft")  # nothing is merged, or only with the base
OF_EACH = ("tall_masks", "emr")  # a model for every task


def options(num_tasks: int) -> dict[str, dict[str, Any]]:
    """What a usual recipe gives a method, where its own defaults are for other models than these."""
    return {
        "dni": {"weights": 1 / num_tasks},
        "expo": {"extrapolation": 0.5},
        "lines": {"first": 1 / num_tasks, "last": 2.5 / num_tasks},
        "task_arithmetic": {"lam": LAM},
        "ties": {"density": DENSITY, "lam": LAM, "reduce": "sum"},
        "dare_linear": {"density": 0.5, "lam": LAM},
        "dare_ties": {"density": 0.5, "lam": LAM},
        "della_linear": {"density": 0.5, "lam": LAM},
        "della": {"density": 0.5, "normalize": False, "lam": LAM},
        "breadcrumbs": {"density": 0.9, "lam": LAM},
        "breadcrumbs_ties": {"density": 0.9, "lam": LAM},
    }


@dataclass(frozen=True)
class Row:
    method: str
    accuracy: float  # percent, average of the tasks
    seconds: float  # of a processor
    nbytes: int  # of the inputs, as often as they are read
    in_turn: bool  # the method takes two models: one expert after the other


def names() -> list[str]:
    return [name for name, method in METHODS.items() if not (method.from_inputs or name in OF_ONE)]


def row(
    base: StateDict,
    experts: Sequence[StateDict],
    accuracies: Callable[[Sequence[StateDict]], list[float]],
    name: str,
) -> Row:
    """What a method comes to; `accuracies`: of a model for each task, on its images."""
    num_tasks, most = len(experts), METHODS[name].num_experts[1]
    given = {"task": 0} if name in OF_EACH else options(num_tasks).get(name, {})
    models = merged(base, experts, name, given)  # and what is made once, before the time counts
    start = time.process_time()
    merged(base, experts, name, given)
    seconds = time.process_time() - start
    merges, inputs = (num_tasks - 1, 2) if most else (num_tasks if name in OF_EACH else 1, num_tasks + 1)
    nbytes = sum(tensor.nbytes for tensor in base.values())
    read = merges * METHODS[name](**given).reads * inputs * nbytes
    return Row(name, average(accuracies(models)), seconds, read, in_turn=most is not None)


def merged(base: StateDict, experts: Sequence[StateDict], name: str, given: dict[str, Any]) -> list[StateDict]:
    """A model for each task, most often the same."""
    most, tasks = METHODS[name].num_experts[1], range(len(experts))
    if name in OF_EACH:
        return [merge_state_dicts(base, experts, method=name, **{**given, "task": task}) for task in tasks]
    if most is None:
        return [merge_state_dicts(base, experts, method=name, **given)] * len(tasks)
    return [one_after_another(experts, name, most)] * len(tasks)


def one_after_another(experts: Sequence[StateDict], name: str, most: int) -> StateDict:
    """The running mean of a method that takes two models: expert k has the weight 1 / k."""
    merged = experts[0]
    for k, expert in enumerate(experts[1:], start=2):
        if most == 2:
            merged = merge_state_dicts(None, [merged, expert], method=name, weights=[k - 1.0, 1.0])
        elif name == "slerp":
            merged = merge_state_dicts(merged, [expert], method=name, t=1 / k)
        elif name == "nearswap":
            merged = merge_state_dicts(merged, [expert], method=name, t=0.01)
        else:
            merged = merge_state_dicts(merged, [expert], method=name)
    return merged


def text(found: list[Row]) -> str:
    lines = [f"{'training-free merges':20} accuracy       time   bytes read", "-" * 52]
    for row in found:
        name = f"{row.method} *" if row.in_turn else row.method
        lines.append(f"{name:20} {row.accuracy:8.1f} {1e3 * row.seconds:7.1f} ms {row.nbytes / 1e6:9.1f} MB")
    return "\n".join([*lines, "* takes two models: one expert after the other, each with its share of the mean"])
