"""Every training-free method on the experts of an experiment: accuracy, time and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..merging import METHODS, merge_state_dicts
from .methods import DENSITY, LAM

StateDict = dict[str, Tensor]

LEARNED = ("fisher", "regmean", "adamerging")  # need inputs
OF_ONE = ("passthrough", "wise_ft")  # nothing is merged, or only with the base


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
    average_accuracy: Callable[[StateDict], float],
) -> list[Row]:
    """One for every method, in the order of their list."""
    found = []
    for name, method in METHODS.items():
        if name in (*LEARNED, *OF_ONE):
            continue
        given = options(len(experts)).get(name, {})
        most = method.num_experts[1]
        start = time.perf_counter()
        if most is None:
            merged = merge_state_dicts(base, experts, method=name, **given)
        else:
            merged = one_after_another(experts, name, most)
        seconds = time.perf_counter() - start
        merges, inputs = (1, len(experts) + 1) if most is None else (len(experts) - 1, 2)
        nbytes = sum(tensor.nbytes for tensor in base.values())
        read = merges * method(**given).reads * inputs * nbytes
        found.append(Row(name, average_accuracy(merged), seconds, read, in_turn=most is not None))
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
