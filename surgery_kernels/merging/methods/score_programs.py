"""Programs of steps over PCB's scores: how much an expert changed an entry, times how much all agree with it there.

With N the magnitude of a change, clipped and brought to [0, 1], and s = sign * N, the score of expert i of n is

    exp(n * (N_i^2 - 1)) * sum over j of tanh(s_i * s_j)

which is the paper's code but for a factor that no weight depends on, and without which many experts overflow. tanh is
an odd polynomial on [-1, 1], so that one sum of powers serves all experts: sum_j tanh(s_i s_j) is a polynomial in s_i
whose coefficients are those of tanh times sum_j s_j^(2k + 1). All of it is additions, multiplications and `exp`: the
same bits on every instruction set and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from operator import add

from ...ops.steps import Steps, Value
from .mask_programs import Models, read, store

# tanh(x) / x in powers of x^2: the least relative error on [-1, 1], 5e-8 for float32 and 1e-17 for float64.
TANH = (
    0.9999999502408815, -0.3333283915359491, 0.13325204077205186, -0.05345702954900354, 0.020289980320438973,
    -0.006203378982082121, 0.0010410225856812554,
)  # fmt: skip
TANH_WIDE = (
    1.0, -0.3333333333333275, 0.1333333333328331, -0.05396825395126731, 0.021869488232283487, -0.0088632322305167,
    0.003592104412747129, -0.0014557168199575857, 0.000589606483114914, -0.00023801988111959738, 9.473391033344001e-05,
    -3.605142310911897e-05, 1.2315996648045483e-05, -3.4075610303484106e-06, 6.510350938367012e-07,
    -6.224696089668405e-08,
)  # fmt: skip
SMALLEST = 1e-12  # sum of weights that is divided by
CLIP = 3  # numbers of every expert that `scores` take: its lower and upper limit, and their distance


def _clipped(steps: Steps, task_vectors: Sequence[Value], t: int) -> Value:
    """The magnitude of a change within its limits, numbers 3t and 3t + 1."""
    return abs(task_vectors[t]).maximum(steps.number(CLIP * t)).minimum(steps.number(CLIP * t + 1))


def _scores(steps: Steps, models: Models, inter: str, wide: bool) -> list[Value]:
    """inter: what agreement is summed of: "paper", "half" or "raw"."""
    num_tasks, signed, squares = float(len(models[2])), [], []
    for t, x in enumerate(models[2]):
        norm = (_clipped(steps, models[2], t) - steps.number(CLIP * t)) / steps.number(CLIP * t + 2)
        signed.append((x < 0.0).where(-norm, norm))
        squares.append(norm * norm)
    tanh = TANH_WIDE if wide else TANH
    if inter == "paper":
        agreement = _agreement(signed, squares, tanh)
    else:
        total = reduce(add, signed if inter == "half" else models[2])
        agreement = [_tanh(x * total, tanh) for x in models[2]]
    return [((square - 1.0) * num_tasks).exp() * of_all for square, of_all in zip(squares, agreement, strict=True)]


def _agreement(signed: Sequence[Value], squares: Sequence[Value], tanh: Sequence[float]) -> list[Value]:
    """``sum_j tanh(s_i s_j)`` of every i."""
    sums: list[Value] = []  # of every power
    for power, square in zip(signed, squares, strict=True):
        for k in range(len(tanh)):
            power = power * square if k else power
            sums[k : k + 1] = [sums[k] + power if k < len(sums) else power]
    coefficients = [total * coefficient for total, coefficient in zip(sums, tanh, strict=True)]
    return [s * _polynomial(coefficients, square) for s, square in zip(signed, squares, strict=True)]


def _polynomial(coefficients: Sequence[Value | float], x: Value) -> Value:
    total: Value | float = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = x.times_plus(total, coefficient)
    assert isinstance(total, Value)
    return total


def _tanh(x: Value, tanh: Sequence[float]) -> Value:
    """Of any number: beyond 1 from exp, which would cancel below."""
    magnitude = abs(x)
    far = 1.0 - 2.0 / ((magnitude * 2.0).exp() + 1.0)
    return (magnitude > 1.0).where((x < 0.0).where(-far, far), x * _polynomial(tanh, x * x))


@cache
def scores(num_tasks: int, inter: str, wide: bool, drop: bool) -> Steps:
    """All of them."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        models = read(steps, num_tasks, drop)
        for score in _scores(steps, models, inter, wide):
            steps.store(score)
    return steps


@cache
def near(num_tasks: int, inter: str, wide: bool, drop: bool) -> Steps:
    """Bits of entries of which some expert's score is between its numbers low and high, or at least its number top; and
    how many scores of every expert are above its high. Numbers: after those of `scores`, low, high and top of each."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        models = read(steps, num_tasks, drop)
        chosen, above = [], []
        for t, score in enumerate(_scores(steps, models, inter, wide)):
            low, high, top = (steps.number(CLIP * (num_tasks + t) + i) for i in range(3))
            above.append(score > high)
            chosen.append(((score >= low) - above[-1]).maximum(score >= top))
        steps.store_bits(reduce(Value.maximum, chosen))
        for x in above:
            steps.sum(x)
    return steps


@cache
def merged(num_tasks: int, inter: str, wide: bool, drop: bool) -> Steps:
    """The mean of the clipped changes, each by its score's height above a threshold, as a share of the highest one's.
    Numbers: after those of `scores`, the threshold of each, that height, and its factor in the sum."""
    steps = Steps(1 + num_tasks)
    with steps.exact():
        models = read(steps, num_tasks, drop)
        weights, terms = [], []
        for t, score in enumerate(_scores(steps, models, inter, wide)):
            threshold, height, factor = (steps.number(CLIP * (num_tasks + t) + i) for i in range(3))
            x, a = models[2][t], _clipped(steps, models[2], t)
            change = (x > 0.0).where(a, (x < 0.0).where(-a, 0.0))
            weights.append((score.maximum(threshold) - threshold) / height)
            terms.append(weights[-1] * factor * change)
        store(steps, models[0] + reduce(add, terms) / reduce(add, weights).maximum(SMALLEST), drop)
    return steps
