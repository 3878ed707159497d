"""What each declared method comes to: accuracy, and time, memory and bytes of its merge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ...merging import METHODS, merge_state_dicts
from ..report import average, table
from .published import PUBLISHED
from .settings import Without, of_each, options

StateDict = dict[str, Tensor]
Accuracies = Callable[[Sequence[StateDict]], list[float]]  # of a model for each task, on its samples

FEW_STEPS = 2  # of what learns, where its memory is measured


@dataclass(frozen=True)
class Row:
    method: str
    accuracy: list[float]  # percent, one per task
    seconds: float  # of a processor, what inputs say included
    nbytes_held: int  # at most, besides the models
    nbytes: int  # of the models, as often as they are read
    in_turn: bool = False  # the method takes two models: one expert after the other


def row(base: StateDict, experts: Sequence[StateDict], accuracies: Accuracies, name: str, inputs: Any = None) -> Row:
    """`inputs`: as `Inputs` has it, for methods that need some."""
    method, num_tasks = METHODS[name], len(experts)
    inputs = Without() if inputs is None else inputs
    given = {} if method.from_inputs else options(name, num_tasks, inputs)
    if not method.from_inputs:
        merged(base, experts, name, given)  # what is made once, before the time counts
    start = time.process_time()
    if method.from_inputs:
        given = options(name, num_tasks, inputs)
    models = merged(base, experts, name, given)
    seconds = time.process_time() - start
    few = given | ({"steps": FEW_STEPS} if "objective" in given else {})
    held = nbytes_held(lambda: merged(base, experts, name, few))
    most = method.num_experts[1]
    merges, read = (num_tasks - 1, 2) if most else (num_tasks if of_each(method) else 1, num_tasks + 1)
    nbytes = merges * method(**given).reads * read * sum(tensor.nbytes for tensor in base.values())
    return Row(name, accuracies(models), seconds, held, nbytes, in_turn=most is not None)


def merged(base: StateDict, experts: Sequence[StateDict], name: str, given: dict[str, Any]) -> list[StateDict]:
    """A model for each task, most often the same."""
    most, tasks = METHODS[name].num_experts[1], range(len(experts))
    if of_each(METHODS[name]):
        return [merge_state_dicts(base, experts, method=name, **{**given, "task": task}) for task in tasks]
    if most is None:
        return [merge_state_dicts(base, experts, method=name, progress=False, **given)] * len(tasks)
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


def nbytes_held(call: Callable[[], object]) -> int:
    """The most that torch's tensors took at a time beyond what was there, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    del result
    return most


def short_text(found: Sequence[Row]) -> str:
    """A line for every method: its average, time and bytes read."""
    lines = [f"{'training-free merges':20} accuracy       time   bytes read", "-" * 52]
    for of_method in found:
        name, mean = starred(of_method), average(of_method.accuracy)
        lines.append(f"{name:20} {mean:8.1f} {1e3 * of_method.seconds:7.1f} ms {of_method.nbytes / 1e6:9.1f} MB")
    return "\n".join([*lines, IN_TURN])


IN_TURN = "* takes two models: one expert after the other, each with its share of the mean"


def starred(row: Row) -> str:
    return f"{row.method} *" if row.in_turn else row.method


def whole_text(found: Sequence[Row], tasks: Sequence[str]) -> str:
    """A line for every method: its accuracy by task, what its merge took, and the published average."""
    more = {
        "ms": {starred(r): f"{1e3 * r.seconds:.0f}" for r in found},
        "MB held": {starred(r): f"{r.nbytes_held / 1e6:.1f}" for r in found},
        "MB read": {starred(r): f"{r.nbytes / 1e6:.1f}" if r.nbytes else "" for r in found},
        "published": {starred(r): f"{PUBLISHED[r.method]:.1f}" for r in found if r.method in PUBLISHED},
    }
    text = table({starred(r): r.accuracy for r in found}, tasks, more)
    return "\n".join([text, *([IN_TURN] if any(r.in_turn for r in found) else [])])
