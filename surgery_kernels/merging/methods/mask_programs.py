"""Programs of steps that say which entries each expert keeps of a vector that all share: EMR's masks and TALL's.

The base is the first input, and nothing is rounded before the result. drop: task vectors that are not finite are 0, and
a base that is not finite stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from operator import add

from ...ops.steps import Steps, Value
from .programs import is_finite

Models = tuple[Value, list[Value], list[Value]]


def read(steps: Steps, num_tasks: int, drop: bool) -> Models:
    """The base, the experts, and their differences."""
    base, *experts = (steps.load(i) for i in range(1 + num_tasks))
    if drop:
        known = is_finite(base).where(base, 0.0)
        base, experts = known, [is_finite(x - base).where(x, known) for x in experts]
    return base, experts, [x - base for x in experts]


def store(steps: Steps, merged: Value, drop: bool) -> None:
    base = steps.load(0)
    steps.store(is_finite(base).where(merged, base) if drop else merged)


def _needed(steps: Steps, task_vectors: Sequence[Value], shared: Value, first: int) -> list[Value]:
    """TALL: 1 where an expert is further from the base than number ``first + t`` times from the shared model."""
    return [abs(x) > steps.number(first + t) * abs(shared - x) for t, x in enumerate(task_vectors)]


def _store_consensus(
    steps: Steps, base: Value, task_vectors: Sequence[Value], shared: Value, first: int, drop: bool
) -> None:
    """Number 0 times what at least number 1 of the experts need of `shared`, which is added up."""
    enough = reduce(add, _needed(steps, task_vectors, shared, first)) >= steps.number(1)
    store(steps, base + enough.where(shared * steps.number(0), 0.0), drop)
    steps.sum(shared)


@cache
def consensus(num_tasks: int, drop: bool) -> Steps:
    """Of the sum of the task vectors. Numbers of every expert come from number 2 on."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        base, _, task_vectors = read(steps, num_tasks, drop)
        _store_consensus(steps, base, task_vectors, reduce(add, task_vectors), 2, drop)
    return steps


def _trimmed(steps: Steps, base: Value, experts: Sequence[Value], first: int) -> list[Value]:
    """What TIES keeps: by the task vectors as their dtype stores them, at least number ``first + t``."""
    kept = [abs(_stored(x, base)) >= steps.number(first + t) for t, x in enumerate(experts)]
    return [of_expert.where(x - base, 0.0) for of_expert, x in zip(kept, experts, strict=True)]


def _stored(x: Value, base: Value) -> Value:
    with x.steps.exact(False):
        return x - base


@cache
def votes(num_tasks: int, drop: bool) -> Steps:
    """How many entries elect plus less how many elect minus. Numbers are thresholds."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        base, experts, _ = read(steps, num_tasks, drop)
        mass = reduce(add, _trimmed(steps, base, experts, 0))
        steps.sum((mass > 0.0) - (mass < 0.0))
    return steps


@cache
def consensus_of_ties(num_tasks: int, drop: bool) -> Steps:
    """Of the sum of what TIES keeps and elects. Number 2 is the sign of draws; then come thresholds."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        base, experts, task_vectors = read(steps, num_tasks, drop)
        trimmed = _trimmed(steps, base, experts, 3)
        mass = reduce(add, trimmed)
        positive = mass.equals(0.0).where(steps.number(2), mass) > 0.0
        shared = reduce(add, [(positive.where(x, -x) > 0.0).where(x, 0.0) for x in trimmed])
        _store_consensus(steps, base, task_vectors, shared, 3 + num_tasks, drop)
    return steps


@cache
def tall(num_tasks: int, task: int, drop: bool) -> Steps:
    """What one expert needs of the sum of the task vectors, which is added up. Numbers are those of every expert."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        base, _, task_vectors = read(steps, num_tasks, drop)
        shared = reduce(add, task_vectors)
        needed = _needed(steps, task_vectors, shared, 0)[task]
        store(steps, needed.where(base + shared, base), drop)
        steps.sum(shared)
    return steps


@cache
def tall_packed(num_tasks: int, drop: bool) -> Steps:
    """The model with all changes, and bits of what every expert needs of it."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        base, _, task_vectors = read(steps, num_tasks, drop)
        shared = reduce(add, task_vectors)
        store(steps, base + shared, drop)
        for needed in _needed(steps, task_vectors, shared, 0):
            steps.store_bits(needed)
        steps.sum(shared)
    return steps


def _elected(models: Models) -> tuple[Value, list[Value]]:
    """EMR's shared model, whose entry is that which moved furthest the way that the sum did, and who moved that way."""
    base, experts, task_vectors = models
    positive = reduce(add, task_vectors) > 0.0
    highest, lowest = reduce(Value.maximum, [base, *experts]), reduce(Value.minimum, [base, *experts])
    return positive.where(highest, lowest), [positive.where(x > base, base > x) for x in experts]


def _add_norms(steps: Steps, models: Models, shared: Value, agreeing: Sequence[Value]) -> None:
    """The L1 norms of the task vectors, and then those of what every expert keeps of the shared one."""
    distance = abs(shared - models[0])
    for x in models[2]:
        steps.sum(abs(x))
    for mask in agreeing:
        steps.dot(mask, distance)


@cache
def emr_norms(num_tasks: int, drop: bool) -> Steps:
    steps = Steps(1 + num_tasks)
    with steps.exact():
        models = read(steps, num_tasks, drop)
        _add_norms(steps, models, *_elected(models))
    return steps


@cache
def emr(num_tasks: int, task: int, drop: bool) -> Steps:
    """Number 0 times what one expert keeps of the shared task vector."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        models = read(steps, num_tasks, drop)
        shared, agreeing = _elected(models)
        base = models[0]
        store(steps, agreeing[task].where(base + (shared - base) * steps.number(0), base), drop)
    return steps


@cache
def emr_packed(num_tasks: int, drop: bool) -> Steps:
    """The shared model, bits of what every expert keeps of it, and the norms."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        models = read(steps, num_tasks, drop)
        shared, agreeing = _elected(models)
        store(steps, shared, drop)
        for mask in agreeing:
            steps.store_bits(mask)
        _add_norms(steps, models, shared, agreeing)
    return steps
