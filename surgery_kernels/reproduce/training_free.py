"""Every training-free method on the experts of the experiment: accuracy, time and bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..merging import METHODS, merge_state_dicts
from .experts import Experts, StateDict
from .methods import DENSITY, LAM
from .report import average
from .tasks import TASKS
from .training import accuracy

# What a usual recipe gives a method, where its own defaults are for other models than these.
OPTIONS: dict[str, dict[str, Any]] = {
    "dni": {"weights": 1 / len(TASKS)},
    "expo": {"extrapolation": 0.5},
    "lines": {"first": 1 / len(TASKS), "last": 2.5 / len(TASKS)},
    "task_arithmetic": {"lam": LAM},
    "ties": {"density": DENSITY, "lam": LAM, "reduce": "sum"},
    "dare_linear": {"density": 0.5, "lam": LAM},
    "dare_ties": {"density": 0.5, "lam": LAM},
    "della_linear": {"density": 0.5, "lam": LAM},
    "della": {"density": 0.5, "normalize": False, "lam": LAM},
    "breadcrumbs": {"density": 0.9, "lam": LAM},
    "breadcrumbs_ties": {"density": 0.9, "lam": LAM},
}
LEARNED = ("fisher", "regmean", "adamerging")  # need inputs
OF_ONE = ("passthrough", "wise_ft")  # nothing is merged, or only with the base


@dataclass(frozen=True)
class Row:
    method: str
    accuracy: float  # percent, average of the tasks
    seconds: float
    nbytes: int  # of the inputs, as often as they are read
    in_turn: bool  # the method takes two models: one expert after the other


def rows(experts: Experts) -> list[Row]:
    """One for every method, in the order of their list."""
    found = []
    for name, method in METHODS.items():
        if name in (*LEARNED, *OF_ONE):
            continue
        options = OPTIONS.get(name, {})
        most = method.num_experts[1]
        start = time.perf_counter()
        if most is None:
            merged = merge_state_dicts(experts.pretrained, experts.experts, method=name, **options)
        else:
            merged = one_after_another(experts, name, most)
        seconds = time.perf_counter() - start
        encoder = experts.config.encoder(merged)
        accuracies = [accuracy(encoder, experts.heads, experts.test, task) for task in range(len(TASKS))]
        merges, inputs = (1, len(TASKS) + 1) if most is None else (len(TASKS) - 1, 2)
        nbytes = sum(tensor.nbytes for tensor in experts.pretrained.values())
        read = merges * method(**options).reads * inputs * nbytes
        found.append(Row(name, average(accuracies), seconds, read, in_turn=most is not None))
    return found


def one_after_another(experts: Experts, name: str, most: int) -> StateDict:
    """The running mean of a method that takes two models: expert k has the weight 1 / k."""
    merged = experts.experts[0]
    for k, expert in enumerate(experts.experts[1:], start=2):
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
