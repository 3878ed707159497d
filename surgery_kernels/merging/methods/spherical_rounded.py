"""What mergekit computes on the sphere in 16 bits: every step rounded to the dtype, of vectors and of single numbers.

Vectors are programs of steps, read once for every dot product that depends on others; sums are rounded to the dtype,
as torch rounds them, and between the reads are torch's own operations on a number for every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, reduce
from itertools import combinations
from operator import add

import torch
from torch import Tensor

from ...ops.steps import Steps, Value
from ..scope import Scope
from . import programs

PAIRS = 512  # of which a program adds up the products


def known_tensors(scope: Scope, first: Steps, axis: str, nonfinite: str) -> Iterator[tuple[Scope, Tensor]]:
    """Every tensor alone, to be merged before the next, with the sums of `first`, a program of `first_read` or another.

    Raises:
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names tensor, model and count.
    """
    for part in scope.parts():
        if part.out[0].numel() == 0:
            continue
        sums = first.run(part.inputs, axis=axis)
        is_known = nonfinite == "propagate" or bool(sums[:, : scope.num_tasks].isfinite().all())
        if not is_known and nonfinite == "drop":
            known = programs.only_finite(part, rounded=True)
            yield known, first.run(known.inputs, axis=axis)
            programs.restore(part)
            continue
        if not is_known:
            part.check_finite(task_vectors=bool(part.base), dtype=part.out[0].dtype)
        yield part, sums


@cache
def first_read(num_tasks: int, has_base: bool, pairs: int = 0) -> Steps:
    """The squared norm of every vector, and the products of some pairs of them."""
    steps = Steps(num_tasks + has_base)
    vectors = _vectors(steps, num_tasks, has_base)
    for x in vectors:
        steps.dot(x, x)
    for x, y in list(combinations(vectors, 2))[:pairs]:
        steps.sum(x * y)
    return steps


def nuslerp(scope: Scope, squares: Tensor, t: float, axis: str) -> None:
    has_base = bool(scope.base)
    norms = squares.sqrt().to(scope.out[0].dtype).clamp(min=1e-7)  # [num_blocks, 2]
    sums = _product_of_units(has_base).run(scope.inputs, norms, axis=axis)
    cosine = sums[:, 0].to(norms.dtype).clamp(-1, 1)
    linear = (1 - cosine.square()) <= 1e-16
    angle = torch.where(linear, 0, cosine).acos()
    of_first, of_second, divisor = ((1 - t) * angle).sin(), (t * angle).sin(), angle.sin()
    on_chord = [torch.full_like(sums[:, 0], share) for share in (1 - t, t)]
    numbers = torch.stack([x.double() for x in (of_first, of_second, divisor, *on_chord, linear)], dim=1)
    _arc(has_base).run(scope.inputs, numbers, axis=axis, out=scope.out)


def model_stock(scope: Scope, sums: Tensor, axis: str) -> None:
    """sums: squares, and the products of the first PAIRS pairs."""
    count, dtype = scope.num_tasks, scope.out[0].dtype
    norms = sums[:, :count].sqrt().to(dtype)  # [num_blocks, num_tasks]
    more = range(PAIRS, count * (count - 1) // 2, PAIRS)
    products = torch.cat([sums[:, count:], *(_products(count, i).run(scope.inputs, axis=axis) for i in more)], dim=1)
    i, j = torch.triu_indices(count, count, 1, device=norms.device)
    cosines = (products.to(dtype) / (norms[:, i] * norms[:, j]).clamp(min=1e-6)).clamp(-1, 1)
    cosine = cosines.T.contiguous().mean(dim=0)
    below = 1 + (count - 1) * cosine
    singular = below.abs() < 1e-6
    t = torch.where(singular, 0, (count * cosine) / torch.where(singular, 1, below))
    _towards_the_mean(count).run(scope.inputs, torch.stack([t, 1 - t], dim=1), axis=axis, out=scope.out)


def multislerp(scope: Scope, squares: Tensor, weights: list[float], normalize: bool, eps: float) -> None:
    form, dtype = (scope.num_tasks, bool(scope.base)), scope.out[0].dtype
    norms = squares[0].sqrt().to(dtype)  # [num_tasks]
    shares = torch.tensor(weights, dtype=dtype, device=norms.device)
    if normalize:
        shares = shares / shares.sum()
    numbers = [*(norms + eps).unbind(), *shares.unbind()]

    def sums_of(program: Steps, inputs: list[Tensor], out: Sequence[Tensor] = ()) -> Tensor:
        return program.run(inputs, torch.stack(numbers)[None], out=out)[0]

    with_mean = [*scope.inputs, scope.out[0]]  # where the mean of units waits
    length = sums_of(_weighted_mean(*form), scope.inputs, scope.out)[0].sqrt().to(dtype)
    if length < eps:
        if scope.num_tasks > 2 and bool(norms.any()):
            name = scope.names[0]
            raise ValueError(f"weights must leave a mean direction, got models that cancel in tensor {name!r}")
        sums_of(_weighted_sum(*form), scope.inputs, scope.out)
        return
    numbers.append(length)
    numbers += sums_of(_cosines(*form), with_mean).to(dtype).unbind()
    angle = sums_of(_tangent_square(*form), with_mean)[0].sqrt().to(dtype) + eps
    stretch = angle.sin() / angle if angle != 0 else torch.ones_like(angle)  # eps is 0 in float16
    numbers += [angle.cos(), stretch, (norms * shares).sum()]
    sums_of(_exponential_map(*form), with_mean, scope.out)


def karcher(scope: Scope, squares: Tensor, max_iter: int, tol: float) -> None:
    """Norms are of float32. The direction waits in out[0], to be divided by number `num_valid`."""
    norms = squares[0].sqrt().float()  # [num_tasks]
    scale = reduce(add, [1.0 / len(norms) * norm for norm in norms])
    valid = [t for t, norm in enumerate(norms.tolist()) if norm > tol]
    if not valid:
        _zeros(len(norms)).run(scope.inputs, out=scope.out)
        return
    count, dtype = len(valid), scope.out[0].dtype
    experts = [scope.inputs[t] for t in valid]
    with_mean = [*experts, scope.out[0]]
    of_units = norms[valid].double()

    def sums_of(program: Steps, inputs: list[Tensor], *numbers: Tensor, out: Sequence[Tensor] = ()) -> Tensor:
        return program.run(inputs, torch.cat([of_units, *(x.double().view(-1) for x in numbers)]), out=out)[0]

    shares = torch.full_like(of_units, 1.0 / count)
    length = sums_of(_sum_of_units(count), experts, shares, out=scope.out)[0].sqrt().float()
    if length.item() < tol:
        first = torch.eye(count, dtype=torch.float64, device=norms.device)[0]
        sums_of(_sum_of_units(count), experts, first, out=scope.out)
        length = torch.ones_like(length)
    for _ in range(max_iter):
        cosines = sums_of(_cosines_to_mean(count), with_mean, length).to(dtype).clamp(-1, 1)
        angles = cosines.acos()
        pulls = torch.where(angles.double() < tol, 0, 1.0 / count * (angles / angles.sin()))
        step = sums_of(_pull_square(count), with_mean, length, cosines, pulls)[0].sqrt().float()
        if step.item() < tol:
            break
        turn = [step, step.cos().to(dtype), step.sin().to(dtype)]
        length = sums_of(_turned(count), with_mean, length, cosines, pulls, *turn, out=scope.out)[0].sqrt().float()
        length = torch.where(length.double() > tol, length, 1)
    numbers = torch.stack([length, scale.to(dtype).float()])
    _scaled().run([scope.out[0]], numbers, out=scope.out)


def _vectors(steps: Steps, num_tasks: int, has_base: bool) -> list[Value]:
    """The task vectors, or the experts."""
    loaded = [steps.load(i) for i in range(num_tasks + has_base)]
    return [x - loaded[0] for x in loaded[1:]] if has_base else loaded


def _rounded_sum(steps: Steps, terms: list[Value]) -> Value:
    """Rounded once, as torch adds up a dimension."""
    with steps.exact():
        total = reduce(add, terms)
    return total * 1.0


def _store(steps: Steps, merged: Value, has_base: bool) -> Steps:
    steps.store(steps.load(0) + merged if has_base else merged)
    return steps


@cache
def _products(num_tasks: int, first: int) -> Steps:
    """Of PAIRS pairs of task vectors."""
    steps = Steps(1 + num_tasks)
    pairs = list(combinations(_vectors(steps, num_tasks, True), 2))
    for x, y in pairs[first : first + PAIRS]:
        steps.sum(x * y)
    return steps


@cache
def _product_of_units(has_base: bool) -> Steps:
    """Of two vectors divided by numbers 0 and 1."""
    steps = Steps(2 + has_base)
    x, y = _vectors(steps, 2, has_base)
    steps.sum((x / steps.number(0)) * (y / steps.number(1)))
    return steps


@cache
def _arc(has_base: bool) -> Steps:
    """Numbers: the sines of both shares of the angle, and of the angle; the shares; whether these count."""
    steps = Steps(2 + has_base)
    x, y = _vectors(steps, 2, has_base)
    on_arc = (steps.number(0) * x + steps.number(1) * y) / steps.number(2)
    on_chord = steps.number(3) * x + steps.number(4) * y
    return _store(steps, steps.number(5).where(on_chord, on_arc), has_base)


@cache
def _towards_the_mean(num_tasks: int) -> Steps:
    steps = Steps(1 + num_tasks)
    mean = reduce(add, [steps.load(1 + t) for t in range(num_tasks)]) / float(num_tasks)
    steps.store(steps.number(0) * mean + steps.number(1) * steps.load(0))
    return steps


def _weights(steps: Steps, num_tasks: int) -> list[Value]:
    return [steps.number(num_tasks + t) for t in range(num_tasks)]


def _units(steps: Steps, num_tasks: int, has_base: bool) -> list[Value]:
    return [x / steps.number(t) for t, x in enumerate(_vectors(steps, num_tasks, has_base))]


def _weighted(steps: Steps, vectors: list[Value]) -> Value:
    weights = _weights(steps, len(vectors))
    return _rounded_sum(steps, [x * weight for x, weight in zip(vectors, weights, strict=True)])


def _mean(steps: Steps, num_tasks: int) -> Value:
    """Of length 1; the last input is that of units."""
    return steps.load(steps.num_inputs - 1) / steps.number(2 * num_tasks)


def _tangent(steps: Steps, units: list[Value], mean: Value) -> Value:
    first = 2 * len(units) + 1
    return _weighted(steps, [x - steps.number(first + t) * mean for t, x in enumerate(units)])


@cache
def _weighted_mean(num_tasks: int, has_base: bool) -> Steps:
    """Of units, and its square."""
    steps = Steps(num_tasks + has_base)
    mean = _weighted(steps, _units(steps, num_tasks, has_base))
    steps.store(mean)
    steps.dot(mean, mean)
    return steps


@cache
def _weighted_sum(num_tasks: int, has_base: bool) -> Steps:
    steps = Steps(num_tasks + has_base)
    vectors = _vectors(steps, num_tasks, has_base)
    terms = [x * weight for x, weight in zip(vectors, _weights(steps, num_tasks), strict=True)]
    return _store(steps, reduce(add, terms), has_base)


@cache
def _cosines(num_tasks: int, has_base: bool) -> Steps:
    steps = Steps(num_tasks + has_base + 1)
    units = _units(steps, num_tasks, has_base)
    mean = _mean(steps, num_tasks)
    for x in units:
        steps.sum(x * mean)
    return steps


@cache
def _tangent_square(num_tasks: int, has_base: bool) -> Steps:
    steps = Steps(num_tasks + has_base + 1)
    units = _units(steps, num_tasks, has_base)
    tangent = _tangent(steps, units, _mean(steps, num_tasks))
    steps.dot(tangent, tangent)
    return steps


@cache
def _exponential_map(num_tasks: int, has_base: bool) -> Steps:
    """The last numbers: the cosine of the angle, its sine by it, and the mean norm."""
    steps = Steps(num_tasks + has_base + 1)
    units = _units(steps, num_tasks, has_base)
    mean, last = _mean(steps, num_tasks), 3 * num_tasks + 1
    on_sphere = mean * steps.number(last) + _tangent(steps, units, mean) * steps.number(last + 1)
    return _store(steps, on_sphere * steps.number(last + 2), has_base)


@cache
def _zeros(num_tasks: int) -> Steps:
    """NaN where a model is not finite."""
    steps = Steps(num_tasks)
    steps.store(reduce(add, [x * 0.0 for x in _vectors(steps, num_tasks, False)], steps.constant(0.0)))
    return steps


@cache
def _sum_of_units(num_tasks: int) -> Steps:
    """Weighted, added up one after the other; and its square."""
    steps = Steps(num_tasks)
    units = _units(steps, num_tasks, False)
    total = reduce(add, [x * weight for x, weight in zip(units, _weights(steps, num_tasks), strict=True)])
    steps.store(total)
    steps.dot(total, total)
    return steps


def _units_and_mean(steps: Steps, num_tasks: int) -> tuple[list[Value], Value]:
    """The last input is the mean, but for its length."""
    return _units(steps, num_tasks, False), steps.load(num_tasks) / steps.number(num_tasks)


def _pull(steps: Steps, units: list[Value], mean: Value) -> Value:
    """Towards all units: numbers behind the length are the cosines, and what their angles pull with."""
    first, count = len(units) + 1, len(units)
    pulls = [steps.number(first + count + t) * (x - steps.number(first + t) * mean) for t, x in enumerate(units)]
    return reduce(add, pulls)


@cache
def _cosines_to_mean(num_tasks: int) -> Steps:
    steps = Steps(num_tasks + 1)
    units, mean = _units_and_mean(steps, num_tasks)
    for x in units:
        steps.dot(x, mean)
    return steps


@cache
def _pull_square(num_tasks: int) -> Steps:
    steps = Steps(num_tasks + 1)
    pull = _pull(steps, *_units_and_mean(steps, num_tasks))
    steps.dot(pull, pull)
    return steps


@cache
def _turned(num_tasks: int) -> Steps:
    """The mean after a step, and its square. The last numbers: the length of the pull, its cosine and its sine."""
    steps = Steps(num_tasks + 1)
    units, mean = _units_and_mean(steps, num_tasks)
    length, cosine, sine = (steps.number(3 * num_tasks + 1 + i) for i in range(3))
    turned = cosine * mean + sine * (_pull(steps, units, mean) / length)
    steps.store(turned)
    steps.dot(turned, turned)
    return steps


@cache
def _scaled() -> Steps:
    """Divided by number 0, times number 1."""
    steps = Steps(1)
    steps.store(steps.number(1) * (steps.load(0) / steps.number(0)))
    return steps
