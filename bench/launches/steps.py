"""What is compiled ahead of time of steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from surgery_kernels.ops.steps import Steps
from surgery_kernels.triton.steps import steps_out

from . import Launch


def distance() -> Steps:
    """Towards the other tensor by a number, where that is within limits, and other steps of one element."""
    steps = Steps(2)
    base, other = steps.load(0), steps.load(1)
    away = abs(base - other).maximum(1e-6)
    weight = (1.0 / away * steps.number(0)).minimum(1.0)
    chosen = weight.times_plus(other, (-weight).sqrt() * base)
    steps.store(away.within(1).where(chosen, base.exp() + (other > base) * other.log()))
    return steps


def variance(num_tasks: int) -> Steps:
    """Of the differences to the first input, added up and weighted by it."""
    steps = Steps(num_tasks + 1)
    task_vectors = [steps.load(1 + t) - steps.load(0) for t in range(num_tasks)]
    mean = sum(task_vectors, 0.0) / float(num_tasks)
    with steps.exact():
        varied = sum(((x - mean) * (x - mean) for x in task_vectors), 0.0) / float(num_tasks)
    steps.store(sum((x * varied.within(0) * steps.number(2 + t) for t, x in enumerate(task_vectors)), 0.0))
    return steps


def products(num_tasks: int) -> Steps:
    """Of every task vector with the next, where they are alike in sign."""
    steps = Steps(num_tasks + 1)
    task_vectors = [steps.load(1 + t) - steps.load(0) for t in range(num_tasks)]
    for x, y in zip(task_vectors, task_vectors[1:] + task_vectors[:1], strict=True):
        steps.dot(x, y * (x * y > 0.0))
        steps.sum(abs(x).sqrt())
    return steps


def positive(num_tasks: int) -> Steps:
    """Where task vectors have the sign of their sum, in bits."""
    steps = Steps(num_tasks + 1)
    task_vectors = [steps.load(1 + t) - steps.load(0) for t in range(num_tasks)]
    total = sum(task_vectors, 0.0)
    for x in task_vectors:
        steps.store_bits(x * total > 0.0)
    return steps


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.zeros(1 << 7, 1 << 7, dtype=dtype) for _ in range(66)]
        for num_tasks, axis in ((1, "tensor"), (8, "tensor"), (8, "row"), (64, "tensor")):
            steps = variance(num_tasks) if num_tasks > 1 else distance()
            numbers = steps.table([0.0] * steps.num_numbers).expand(1 if axis == "tensor" else 1 << 7, -1)
            call = (tensors[: num_tasks + 1], num_tasks + 1, steps.program, numbers, axis)
            yield Launch(
                f"{dtype}, {num_tasks} experts, numbers per {axis}",
                partial(steps_out, *call, out=tensors[-1:]),
                wide=("_steps",) if num_tasks < 64 and axis == "tensor" else (),  # long programs are no constants
            )
        for num_tasks, axis in ((8, "tensor"), (8, "column"), (64, "tensor")):
            steps = products(num_tasks)
            call = (tensors[: num_tasks + 1], num_tasks + 1, steps.program, steps.table([]), axis)
            yield Launch(f"{dtype}, {num_tasks} experts, sums per {axis}", partial(steps_out, *call, out=[]))
        steps, bits = positive(8), list(torch.zeros(8, 1 << 11, dtype=torch.uint8))
        call = (tensors[:9], 9, steps.program, steps.table([]))
        yield Launch(f"{dtype}, 8 experts, bits", partial(steps_out, *call, out=bits))
