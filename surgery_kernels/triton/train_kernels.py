"""The kernels of surgery_train: all steps of a slice of a task, and single operations of steps made of other ops."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .addresses import pointer_to

NUMBERS = tl.constexpr(5)  # of Adam, before the corrections of its steps
TASK_WORDS = tl.constexpr(4)  # addresses of features and targets, number of images, whether both are multiples of 16
LOSS_ROOM = tl.constexpr(16)  # for the loss of a slice, so that what lies behind is aligned


@triton.jit
def _move(at, first_at, second_at, mask, gradient, numbers, correction, zero_grad_steps):
    """One step of Adam with the gradient and `zero_grad_steps` without one; returns the new values, which it stores.

    numbers: decays of the first moment and of the second, each with its complement, and eps. correction: rate and scale
    of this step and of those without a gradient.
    """
    keep1 = tl.load(numbers).to(gradient.dtype)
    take1 = tl.load(numbers + 1).to(gradient.dtype)
    keep2 = tl.load(numbers + 2).to(gradient.dtype)
    take2 = tl.load(numbers + 3).to(gradient.dtype)
    eps = tl.load(numbers + 4).to(gradient.dtype)
    value = tl.load(at, mask=mask, other=0.0)
    first = tl.load(first_at, mask=mask, other=0.0) * keep1 + gradient * take1
    second = tl.load(second_at, mask=mask, other=0.0) * keep2 + gradient * gradient * take2
    for i in range(0, 1 + zero_grad_steps):
        if i > 0:
            first *= keep1
            second *= keep2
        rate = tl.load(correction + 2 * i).to(gradient.dtype)
        scale = tl.load(correction + 2 * i + 1).to(gradient.dtype)
        value -= rate * first / (tl.sqrt(second) * scale + eps)
    tl.store(at, value, mask=mask)
    tl.store(first_at, first, mask=mask)
    tl.store(second_at, second, mask=mask)
    return value


@triton.jit
def _meet(arrived, count):
    """Waits until programs have come here `count` times, all told: what they stored before can be loaded after."""
    tl.debug_barrier()  # of all threads
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _sum_of_slices(own, shared, place, slice, arrived, count, SLICES: tl.constexpr, SIZE: tl.constexpr):
    """The sum of what every program of a task has of its own, in the order of the slices."""
    tl.store(shared + slice * SIZE + place, own)
    _meet(arrived, count)
    total = tl.zeros_like(own)
    for s in tl.static_range(SLICES):
        total += tl.load(shared + s * SIZE + place, cache_modifier=".cg")  # past a cache that others do not write to
    return total


@triton.jit
def _load_images(at, image, d, num_images, there, dim, COMPUTE: tl.constexpr):
    """A tile [batch, dim] of a task's images; NaN for an image that is not there."""
    exists = (image >= 0) & (image < num_images)
    mask = (there & exists)[:, None] & (d[None, :] < dim)
    tile = tl.load(at + image[:, None] * dim + d[None, :], mask=mask, other=0.0).to(COMPUTE)
    return tl.where((there & ~exists)[:, None], float("nan"), tile)


@triton.jit
def _train(
    row, numbers, down, up, down_moments, up_moments, indices, losses, shared, arrived,
    num_tasks, steps, batch, dim, rank, zero_grad_steps, task, slice,
    BATCH: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RANK: tl.constexpr, SLICES: tl.constexpr,
    STORED: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every step of one slice of one task."""
    features, targets = pointer_to(tl.load(row), STORED, ALIGNED), pointer_to(tl.load(row + 1), STORED, ALIGNED)
    num_images = tl.load(row + 2)
    adapter = task * rank * dim
    second_moments = num_tasks * rank * dim
    b = tl.arange(0, BATCH)
    r = tl.arange(0, BLOCK_RANK)
    there = b < batch
    slope = tl.full((1, 1), 1, COMPUTE) / (batch * dim)
    SIZE: tl.constexpr = BATCH * BLOCK_RANK
    place = b[:, None] * BLOCK_RANK + r[None, :]
    shared += task * (2 * SIZE + LOSS_ROOM) * SLICES
    shared_losses = shared + 2 * SIZE * SLICES
    arrived += task
    meeting = SLICES

    correction = numbers + NUMBERS
    image = tl.load(indices + task * batch + b, mask=there, other=0)
    product = tl.zeros((BATCH, BLOCK_RANK), dtype=COMPUTE)  # features down^T
    for start in range(slice * BLOCK_DIM, dim, SLICES * BLOCK_DIM):
        d = start + tl.arange(0, BLOCK_DIM)
        mask = (d[:, None] < dim) & (r[None, :] < rank)
        columns = tl.load(down + adapter + r[None, :] * dim + d[:, None], mask=mask, other=0.0)
        x = _load_images(features, image, d, num_images, there, dim, COMPUTE)
        product = tl.dot(x, columns, product, input_precision=PRECISION, out_dtype=COMPUTE)

    for step in range(steps):
        if SLICES > 1:
            product = _sum_of_slices(product, shared, place, slice, arrived, meeting, SLICES, SIZE)
            meeting += SLICES
        hidden = tl.where(product <= 0, 0.0, product)  # NaN stays
        against_hidden = tl.zeros((BATCH, BLOCK_RANK), dtype=COMPUTE)  # signs up
        total = tl.zeros((BATCH, BLOCK_DIM), dtype=COMPUTE)
        for start in range(slice * BLOCK_DIM, dim, SLICES * BLOCK_DIM):
            d = start + tl.arange(0, BLOCK_DIM)
            mask = (d[:, None] < dim) & (r[None, :] < rank)
            at = adapter + d[:, None] * rank + r[None, :]
            columns = tl.load(up + at, mask=mask, other=0.0)
            x = _load_images(features, image, d, num_images, there, dim, COMPUTE)
            x -= _load_images(targets, image, d, num_images, there, dim, COMPUTE)
            x -= tl.dot(hidden, tl.trans(columns), input_precision=PRECISION, out_dtype=COMPUTE)
            x = tl.where(there[:, None] & (d[None, :] < dim), x, 0.0)
            total += tl.abs(x)
            sign = (x > 0).to(COMPUTE) - (x < 0).to(COMPUTE)
            against_hidden = tl.dot(sign, columns, against_hidden, input_precision=PRECISION, out_dtype=COMPUTE)
            gradient = tl.dot(tl.trans(sign), hidden, input_precision=PRECISION, out_dtype=COMPUTE) * -slope
            first = up_moments + at
            _move(up + at, first, first + second_moments, mask, gradient, numbers, correction, zero_grad_steps)
        loss = tl.sum(tl.sum(total, axis=1, keep_dims=True) * slope, axis=0)  # [1]
        one = tl.arange(0, 1)
        if SLICES > 1:
            tl.store(shared_losses + slice + one, loss)
            against_hidden = _sum_of_slices(
                against_hidden, shared + SIZE * SLICES, place, slice, arrived, meeting, SLICES, SIZE
            )
            meeting += SLICES
            loss = tl.zeros_like(loss)
            for s in tl.static_range(SLICES):
                loss += tl.load(shared_losses + s + one, cache_modifier=".cg")
        tl.store(losses + task + one, loss, mask=(one + slice) == 0)

        d_hidden = tl.where(hidden <= 0, 0.0, against_hidden * -slope)
        losses += num_tasks
        indices += num_tasks * batch
        goes_on = there & (step + 1 < steps)
        following = tl.load(indices + task * batch + b, mask=goes_on, other=0)
        product = tl.zeros((BATCH, BLOCK_RANK), dtype=COMPUTE)
        for start in range(slice * BLOCK_DIM, dim, SLICES * BLOCK_DIM):
            d = start + tl.arange(0, BLOCK_DIM)
            mask = (d[:, None] < dim) & (r[None, :] < rank)
            at = adapter + r[None, :] * dim + d[:, None]
            x = _load_images(features, image, d, num_images, there, dim, COMPUTE)
            gradient = tl.dot(tl.trans(x), d_hidden, input_precision=PRECISION, out_dtype=COMPUTE)
            first = down_moments + at
            columns = _move(
                down + at, first, first + second_moments, mask, gradient, numbers, correction, zero_grad_steps
            )
            x = _load_images(features, following, d, num_images, goes_on, dim, COMPUTE)
            product = tl.dot(x, columns, product, input_precision=PRECISION, out_dtype=COMPUTE)
        image = following
        correction += 2 * (1 + zero_grad_steps)
        tl.debug_barrier()  # what this step wrote is read by other threads in the next


@triton.jit(do_not_specialize=["first_task"])
def train_kernel(
    table, numbers, down, up, down_moments, up_moments, indices, losses, shared, arrived, first_task,
    num_tasks, steps, batch, dim, rank, zero_grad_steps,
    BATCH: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RANK: tl.constexpr, SLICES: tl.constexpr,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every step of one task in SLICES programs that run at the same time. table: what `_tables` says of each task.

    Bound: a step reads and writes each parameter and moment once and reads the images of the batch three times, all of
    it out of the cache. `down` moves and is multiplied by the next batch while it is in registers. Two [batch, rank]
    and a loss go from each program to the others, through `shared`; `arrived`, of each task, is 0 before.
    """
    task, slice = (first_task + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    row = table + TASK_WORDS * task
    if tl.load(row + 3) != 0:
        _train(
            row, numbers, down, up, down_moments, up_moments, indices, losses, shared, arrived,
            num_tasks, steps, batch, dim, rank, zero_grad_steps, task, slice,
            BATCH, BLOCK_DIM, BLOCK_RANK, SLICES, STORED, True, COMPUTE, PRECISION,
        )  # fmt: skip
    else:
        _train(
            row, numbers, down, up, down_moments, up_moments, indices, losses, shared, arrived,
            num_tasks, steps, batch, dim, rank, zero_grad_steps, task, slice,
            BATCH, BLOCK_DIM, BLOCK_RANK, SLICES, STORED, False, COMPUTE, PRECISION,
        )  # fmt: skip


@triton.jit
def gather_kernel(
    table, images, features, targets, batch, dim,
    BATCH: tl.constexpr, BLOCK_DIM: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Images of one task's batch, into features and targets [num_tasks, batch, dim]. Bound: reads and writes them."""
    task = tl.program_id(0).to(tl.int64)
    row = table + TASK_WORDS * task
    if tl.load(row + 3) != 0:
        _gather(row, images, features, targets, batch, dim, task, BATCH, BLOCK_DIM, STORED, True, COMPUTE)
    else:
        _gather(row, images, features, targets, batch, dim, task, BATCH, BLOCK_DIM, STORED, False, COMPUTE)


@triton.jit
def _gather(
    row, images, features, targets, batch, dim, task,
    BATCH: tl.constexpr, BLOCK_DIM: tl.constexpr, STORED: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    there = b < batch
    image = tl.load(images + task * batch + b, mask=there, other=0)
    num_images = tl.load(row + 2)
    to = (task * batch + b)[:, None] * dim
    for start in range(0, dim, BLOCK_DIM):
        d = start + tl.arange(0, BLOCK_DIM)
        mask = there[:, None] & (d[None, :] < dim)
        at = pointer_to(tl.load(row), STORED, ALIGNED)
        tl.store(features + to + d[None, :], _load_images(at, image, d, num_images, there, dim, COMPUTE), mask=mask)
        at = pointer_to(tl.load(row + 1), STORED, ALIGNED)
        tl.store(targets + to + d[None, :], _load_images(at, image, d, num_images, there, dim, COMPUTE), mask=mask)


@triton.jit
def adam_kernel(value, moments, gradient, numbers, numel, step, zero_grad_steps, BLOCK: tl.constexpr):
    """Adam on one parameter of all tasks. Bound: reads and writes the value and both moments, reads the gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    loaded = tl.load(gradient + at, mask=mask, other=0.0)
    correction = numbers + NUMBERS + 2 * step * (1 + zero_grad_steps)
    _move(value + at, moments + at, moments + numel + at, mask, loaded, numbers, correction, zero_grad_steps)
