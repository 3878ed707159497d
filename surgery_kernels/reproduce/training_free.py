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

LEARNED = ("fisher", "regmean", "adamerging", "atlas")  # need inputs
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
    seconds: float
    nbytes: int  # of the inputs, as often as they are read
    in_turn: bool  # the method takes two models: one expert after the other


def rows(
    base: StateDict,
    experts: Sequence[StateDict],
    accuracy: Callable[[StateDict, int], float],
) -> list[Row]:
    """One for every method, in the order of their list; `accuracy` is that of a model on a task, by number."""
    found, tasks = [], range(len(experts))
    for name, method in METHODS.items():
        if name in (*LEARNED, *OF_ONE):
            continue
        given = {"task": 0} if name in OF_EACH else options(len(experts)).get(name, {})
        most = method.num_experts[1]
        start = time.perf_counter()
        if name in OF_EACH:
            models = [merge_state_dicts(base, experts, method=name, task=task) for task in tasks]
        elif most is None:
            models = [merge_state_dicts(base, experts, method=name, **given)] * len(tasks)
        else:
            models = [one_after_another(experts, name, most)] * len(tasks)
        seconds = time.perf_counter() - start
        merges, inputs = (len(experts) - 1, 2) if most else (len(tasks) if name in OF_EACH else 1, len(experts) + 1)
        found_accuracy = average([accuracy(model, task) for task, model in zip(tasks, models, strict=True)])
        nbytes = sum(tensor.nbytes for tensor in base.values())
        read = merges * method(**given).reads * inputs * nbytes
        found.append(Row(name, found_accuracy, seconds, read, in_turn=most is not None))
    return found


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
