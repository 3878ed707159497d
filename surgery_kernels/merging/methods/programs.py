"""Programs of steps that methods run over a base and experts, and what these methods do about NaN and infinity."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, reduce
from math import inf
from operator import add

import torch

from ...ops.steps import Steps, Value
from ..scope import Scope

SMALLEST = 1e-6  # distance or sum of weights that is divided by
OFFSET = 1e-8  # what arcee_fusion adds to probabilities


def _arithmetic(steps: Steps, rounded: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if rounded else steps.exact()


def _task_vectors(steps: Steps, num_tasks: int) -> list[Value]:
    base = steps.load(0)
    return [steps.load(1 + t) - base for t in range(num_tasks)]


def is_finite(x: Value) -> Value:
    return abs(x) < inf


def only_finite(scope: Scope, rounded: bool) -> Scope:
    """Copies of the inputs of one tensor in which task vectors (or experts) that are not finite are 0.

    rounded: whether task vectors are rounded to the dtype.
    """
    inputs = scope.inputs
    known = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    _only_finite(scope.num_tasks, bool(scope.base), rounded).run(inputs, out=known)
    count = len(scope.base)
    return replace(scope, base=known[:count], experts=[known[count:]])


def restore(scope: Scope) -> None:
    """A base that is not finite stays, whatever was merged there."""
    if scope.base:
        _restored().run([scope.base[0], scope.out[0]], out=scope.out)


@cache
def _only_finite(num_tasks: int, has_base: bool, rounded: bool) -> Steps:
    steps = Steps(num_tasks + has_base)
    loaded = [steps.load(i) for i in range(num_tasks + has_base)]
    if not has_base:
        for x in loaded:
            steps.store(is_finite(x).where(x, 0.0))
        return steps
    base, *experts = loaded
    with _arithmetic(steps, rounded):
        of_base = is_finite(base).where(base, 0.0)
        known = [is_finite(x - base).where(x, of_base) for x in experts]
    for x in (of_base, *known):
        steps.store(x)
    return steps


@cache
def _restored() -> Steps:
    steps = Steps(2)
    base, merged = steps.load(0), steps.load(1)
    steps.store(is_finite(base).where(merged, base))
    return steps


@cache
def nearswap(rounded: bool) -> Steps:
    """Number 0 is t; the sum is of the differences."""
    steps = Steps(2)
    with _arithmetic(steps, rounded):
        base, expert = steps.load(0), steps.load(1)
        difference = base - expert
        weight = (1.0 / abs(difference).maximum(SMALLEST) * steps.number(0)).maximum(0.0).minimum(1.0)
        steps.store(weight * expert + (1.0 - weight) * base)
    steps.sum(difference)
    return steps


def _variance(steps: Steps, task_vectors: Sequence[Value], rounded: bool) -> Value:
    """Over the experts, rounded once. Differences to the first one cancel nothing, and are 0 where all are the same."""
    count = float(len(task_vectors))
    with steps.exact():
        total = squares = steps.constant(0.0)
        for x in task_vectors[1:]:
            difference = x - task_vectors[0]
            total, squares = total + difference, difference.times_plus(difference, squares)
        times_count = squares - total * total * (1 / count)
    with _arithmetic(steps, rounded):
        return times_count * (1 / count)


@cache
def variances(num_tasks: int, rounded: bool) -> Steps:
    steps = Steps(1 + num_tasks)
    with _arithmetic(steps, rounded):
        task_vectors = _task_vectors(steps, num_tasks)
    steps.store(_variance(steps, task_vectors, rounded))
    return steps


@cache
def nonzero_variances(num_tasks: int, rounded: bool) -> Steps:
    """How many there are."""
    steps = Steps(1 + num_tasks)
    with _arithmetic(steps, rounded):
        task_vectors = _task_vectors(steps, num_tasks)
    steps.sum(_variance(steps, task_vectors, rounded) > 0.0)
    return steps


def _kept(steps: Steps, task_vectors: Sequence[Value], rounded: bool, selects: bool) -> Value | None:
    """1 where the variance is within numbers 0 and 1, else 0; None where all are selected."""
    return _variance(steps, task_vectors, rounded).within(0) if selects else None


@cache
def sce_squares(num_tasks: int, rounded: bool, selects: bool) -> Steps:
    """The sum of the squares of what is selected of every expert, and then how many variances are not 0."""
    steps = Steps(1 + num_tasks)
    with _arithmetic(steps, rounded):
        task_vectors = _task_vectors(steps, num_tasks)
        kept = _kept(steps, task_vectors, rounded, selects)
        for x in task_vectors:
            steps.sum(x * x) if kept is None else steps.dot(x * x, kept)
    if kept is not None:
        steps.sum(_variance(steps, task_vectors, rounded) > 0.0)
    return steps


@cache
def sce(num_tasks: int, rounded: bool, selects: bool) -> Steps:
    """Weights are the last numbers. Sums over experts are rounded once."""
    steps = Steps(1 + num_tasks)
    with _arithmetic(steps, rounded):
        task_vectors = _task_vectors(steps, num_tasks)
        kept = _kept(steps, task_vectors, rounded, selects)
    with steps.exact():
        total = reduce(add, task_vectors)
    with _arithmetic(steps, rounded):
        positive = total * 1.0 >= 0.0
    with steps.exact():
        elected = positive * 2.0 - 1.0
        agreeing = [steps.number((2 if selects else 0) + t) * (x * elected > 0.0) for t, x in enumerate(task_vectors)]
        weight = reduce(add, agreeing)
    with _arithmetic(steps, rounded):
        terms = [x * of_expert for x, of_expert in zip(task_vectors, agreeing, strict=True)]
    with steps.exact():
        total = reduce(add, terms)
    with _arithmetic(steps, rounded):
        merged = total * 1.0 / (weight * 1.0).maximum(SMALLEST)
        steps.store(steps.load(0) + (merged if kept is None else merged * kept))
    return steps


@cache
def moved(num_tasks: int, finite: bool) -> Steps:
    """How many entries of every expert moved further than number 0 where another's did, and where none did.

    finite: infinity is no move.
    """
    steps = Steps(1 + num_tasks)
    with steps.exact():
        distances = [abs(x) for x in _task_vectors(steps, num_tasks)]
        moved = [x > steps.number(0) for x in distances]
        if finite:
            moved = [x * is_finite(distance) for x, distance in zip(moved, distances, strict=True)]
        several = reduce(add, moved) > 1.0
        together = [x * several for x in moved]
    for x in together:
        steps.sum(x)
    with steps.exact():
        for x, of_several in zip(moved, together, strict=True):
            steps.sum(x - of_several)
    return steps


@cache
def exponentials() -> Steps:
    """The sums over a row of e^(x - number) of both models, number being their largest; and of the task vector."""
    steps = Steps(2)
    with steps.exact():
        for i in range(2):
            steps.sum((steps.load(i) - steps.number(i)).exp())
    steps.sum(steps.load(1) - steps.load(0))
    return steps


@cache
def divergence() -> Steps:
    """Of the expert's softmax over a row from the base's: numbers are the largest, and one over both sums."""
    steps = Steps(2)
    with steps.exact():
        q, p = ((steps.load(i) - steps.number(i)).exp() * steps.number(2 + i) + OFFSET for i in range(2))
        steps.sum(p * (p / q).log())
    return steps


def _importance(steps: Steps) -> tuple[Value, Value]:
    """The task vector, and its importance, where number 0 is the divergence of the row."""
    (task_vector,) = _task_vectors(steps, 1)
    return task_vector, abs(task_vector) * steps.number(0)


@cache
def importance() -> Steps:
    steps = Steps(2)
    with steps.exact():
        _, importance = _importance(steps)
        steps.store(importance)
    return steps


@cache
def fusion() -> Steps:
    """The task vector is added where its importance is at least number 1."""
    steps = Steps(2)
    with steps.exact():
        task_vector, importance = _importance(steps)
        steps.store(steps.load(0) + (importance >= steps.number(1)).where(task_vector, 0.0))
    return steps
