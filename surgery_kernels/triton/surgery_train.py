"""surgery_train in Triton: all steps of a task in one program, without a look from the host.

An adapter and its moments are 6 rank dim numbers, 196 KB at rank 16 and dim 512, and a step does 5 batch rank dim
multiply-adds on them: some ten microseconds of one multiprocessor, most of them spent on waiting for the cache. A
launch for each of its 25 operations, or a barrier of several multiprocessors after each, would take longer than that.
Where batch and rank are too large for the registers of one program, the steps are made of the other ops.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapter_kernels import tf32_is_wanted
from .addresses import TYPES, is_capturing, pointer_to, upload
from .representation_loss import representation_loss, representation_loss_backward
from .surgery_adapter import surgery_adapter, surgery_adapter_backward

ADAM_BLOCK = 2048  # parameters that a program of `_adam_kernel` takes

# By block of ranks and block of images: the columns of dim that a program takes at once, and its warps. As wide as
# registers allow, as every tile waits for the cache; what is not here would spill on some GPU.
TILES = {
    torch.float32: {
        16: {16: (128, 8), 32: (64, 8), 64: (32, 4), 128: (64, 8)},
        32: {16: (64, 8), 32: (32, 8), 64: (32, 8)},
        64: {16: (16, 8), 32: (16, 8)},
    },
    torch.float64: {16: {16: (32, 8), 32: (32, 8), 64: (16, 8)}, 32: {16: (16, 8), 32: (16, 4)}, 64: {16: (16, 4)}},
}
NUMBERS = tl.constexpr(5)  # of Adam, before the corrections of its steps


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
def _load_images(at, image, d, num_images, there, dim, COMPUTE: tl.constexpr):
    """A tile [batch, dim] of a task's images; NaN for an image that is not there."""
    exists = (image >= 0) & (image < num_images)
    mask = (there & exists)[:, None] & (d[None, :] < dim)
    tile = tl.load(at + image[:, None] * dim + d[None, :], mask=mask, other=0.0).to(COMPUTE)
    return tl.where((there & ~exists)[:, None], float("nan"), tile)


@triton.jit
def _train_kernel(
    table, numbers, down, up, down_moments, up_moments, indices, losses,
    num_tasks, steps, batch, dim, rank, zero_grad_steps,
    BATCH: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RANK: tl.constexpr,
    STORED: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every step of one task. table: addresses of features and targets, and number of images, of each task.

    Bound: a step reads and writes each parameter and moment once and reads the images of the batch three times, all of
    it out of the cache. `down` moves and is multiplied by the next batch while it is in registers.
    """
    task = tl.program_id(0).to(tl.int64)
    features = pointer_to(tl.load(table + 3 * task), STORED, ALIGNED)
    targets = pointer_to(tl.load(table + 3 * task + 1), STORED, ALIGNED)
    num_images = tl.load(table + 3 * task + 2)
    adapter = task * rank * dim
    second_moments = num_tasks * rank * dim
    b = tl.arange(0, BATCH)
    r = tl.arange(0, BLOCK_RANK)
    there = b < batch
    slope = tl.full((1, 1), 1, COMPUTE) / (batch * dim)

    correction = numbers + NUMBERS
    image = tl.load(indices + task * batch + b, mask=there, other=0)
    product = tl.zeros((BATCH, BLOCK_RANK), dtype=COMPUTE)  # features down^T
    for start in range(0, dim, BLOCK_DIM):
        d = start + tl.arange(0, BLOCK_DIM)
        mask = (d[:, None] < dim) & (r[None, :] < rank)
        columns = tl.load(down + adapter + r[None, :] * dim + d[:, None], mask=mask, other=0.0)
        x = _load_images(features, image, d, num_images, there, dim, COMPUTE)
        product = tl.dot(x, columns, product, input_precision=PRECISION, out_dtype=COMPUTE)

    for step in range(steps):
        hidden = tl.where(product <= 0, 0.0, product)  # NaN stays
        against_hidden = tl.zeros((BATCH, BLOCK_RANK), dtype=COMPUTE)  # signs up
        total = tl.zeros((BATCH, BLOCK_DIM), dtype=COMPUTE)
        for start in range(0, dim, BLOCK_DIM):
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
        tl.store(losses + task + tl.arange(0, 1), tl.sum(tl.sum(total, axis=1, keep_dims=True) * slope, axis=0))

        d_hidden = tl.where(hidden <= 0, 0.0, against_hidden * -slope)
        losses += num_tasks
        indices += num_tasks * batch
        goes_on = there & (step + 1 < steps)
        following = tl.load(indices + task * batch + b, mask=goes_on, other=0)
        product = tl.zeros((BATCH, BLOCK_RANK), dtype=COMPUTE)
        for start in range(0, dim, BLOCK_DIM):
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


@triton.jit
def _gather_kernel(
    table, images, features, targets, batch, dim,
    BATCH: tl.constexpr, BLOCK_DIM: tl.constexpr, STORED: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Images of one task's batch, into features and targets [num_tasks, batch, dim]. Bound: reads and writes them."""
    task = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    there = b < batch
    image = tl.load(images + task * batch + b, mask=there, other=0)
    num_images = tl.load(table + 3 * task + 2)
    to = (task * batch + b)[:, None] * dim
    for start in range(0, dim, BLOCK_DIM):
        d = start + tl.arange(0, BLOCK_DIM)
        mask = there[:, None] & (d[None, :] < dim)
        at = pointer_to(tl.load(table + 3 * task), STORED, ALIGNED)
        tl.store(features + to + d[None, :], _load_images(at, image, d, num_images, there, dim, COMPUTE), mask=mask)
        at = pointer_to(tl.load(table + 3 * task + 1), STORED, ALIGNED)
        tl.store(targets + to + d[None, :], _load_images(at, image, d, num_images, there, dim, COMPUTE), mask=mask)


@triton.jit
def _adam_kernel(value, moments, gradient, numbers, numel, step, zero_grad_steps, BLOCK: tl.constexpr):
    """Adam on one parameter of all tasks. Bound: reads and writes the value and both moments, reads the gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    loaded = tl.load(gradient + at, mask=mask, other=0.0)
    correction = numbers + NUMBERS + 2 * step * (1 + zero_grad_steps)
    _move(value + at, moments + at, moments + numel + at, mask, loaded, numbers, correction, zero_grad_steps)


def surgery_train(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    down: Tensor,
    up: Tensor,
    down_moments: Tensor,
    up_moments: Tensor,
    indices: Tensor,
    step: int = 0,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    zero_grad_steps: int = 0,
) -> Tensor:
    """Moves down, up and their moments in place; the losses [steps, num_tasks].

    Images that are not there are refused, which waits for the device once, before the first step; while a CUDA graph is
    captured they make their task NaN.
    """
    features, targets = [x.contiguous() for x in features], [x.contiguous() for x in targets]
    indices = indices.contiguous()
    moved = {"down": down, "up": up, "down_moments": down_moments, "up_moments": up_moments}
    _check_shapes(features, targets, moved, indices)
    _check_apart(moved, [*features, *targets, indices])
    if not is_capturing(down.device):
        _check_images(features, indices)
    steps, num_tasks, batch = indices.shape
    rank, dim = down.shape[1:]
    table, numbers = _tables(features, targets, steps, step, lr, (beta1, beta2), eps, zero_grad_steps)
    losses = down.new_empty(steps, num_tasks)
    block_batch, block_rank = (max(16, triton.next_power_of_2(x)) for x in (batch, rank))
    compute = TYPES[down.dtype]
    images = {
        "STORED": TYPES[features[0].dtype],
        "ALIGNED": all(x.data_ptr() % 16 == 0 for x in (*features, *targets)),
        "COMPUTE": compute,
    }
    tile = TILES[down.dtype].get(block_rank, {}).get(block_batch)
    if tile is None:
        _train_by_ops(table, numbers, moved, indices, losses, zero_grad_steps, images)
    elif steps > 0:
        block_dim, num_warps = tile
        _train_kernel[(num_tasks,)](
            table, numbers, down, up, down_moments, up_moments, indices, losses,
            num_tasks, steps, batch, dim, rank, zero_grad_steps,
            BATCH=block_batch, BLOCK_DIM=block_dim, BLOCK_RANK=block_rank,
            **images,
            PRECISION="tf32" if tf32_is_wanted() and compute == tl.float32 else "ieee",
            num_warps=num_warps, num_stages=1, enable_fp_fusion=False,  # the same bits alone and beside others
        )  # fmt: skip
    return losses


def _train_by_ops(
    table: Tensor,
    numbers: Tensor,
    moved: dict[str, Tensor],
    indices: Tensor,
    losses: Tensor,
    zero_grad_steps: int,
    images: dict[str, Any],
) -> None:
    down, up, *moments = moved.values()
    _, num_tasks, batch = indices.shape
    dim = down.shape[-1]
    x, y = (down.new_empty(num_tasks, batch, dim) for _ in range(2))
    ones = losses.new_ones(num_tasks)
    for step, batches in enumerate(indices):
        _gather_kernel[num_tasks, triton.cdiv(batch, 16)](
            table, batches, x, y, batch, dim, BATCH=16, BLOCK_DIM=128, **images, enable_fp_fusion=False
        )
        corrected, _, hidden = surgery_adapter(x, down, up, keep_hidden=True)
        losses[step], signs = representation_loss(corrected, y, True)
        grad = representation_loss_backward(ones, signs, down.dtype)
        _, *gradients, _ = surgery_adapter_backward(grad, None, x, down, up, None, hidden, False, True)
        for value, of_value, gradient in zip((down, up), moments, gradients, strict=True):
            numel = value.numel()
            _adam_kernel[(triton.cdiv(numel, ADAM_BLOCK),)](
                value,
                of_value,
                gradient,
                numbers,
                numel,
                step,
                zero_grad_steps,
                BLOCK=ADAM_BLOCK,
                enable_fp_fusion=False,
            )


def _tables(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    steps: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    zero_grad_steps: int,
) -> tuple[Tensor, Tensor]:
    """What `_train_kernel` calls table, int64 [num_tasks, 3], and numbers, float64."""
    addresses = [[x.data_ptr(), y.data_ptr(), len(x)] for x, y in zip(features, targets, strict=True)]
    t = torch.arange(1, 1 + steps * (1 + zero_grad_steps), dtype=torch.float64) + step
    corrections = torch.stack([lr / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()], dim=1)
    adam = torch.tensor([betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps], dtype=torch.float64)
    numbers = torch.cat([adam, corrections.view(-1)])
    words = torch.cat([torch.tensor(addresses).view(-1), numbers.view(torch.int64)])
    table, numbers = upload(words, features[0].device).split([3 * len(features), len(numbers)])
    return table.view(-1, 3), numbers.view(torch.float64)


def _check_shapes(
    features: Sequence[Tensor], targets: Sequence[Tensor], moved: dict[str, Tensor], indices: Tensor
) -> None:
    """What would corrupt memory; users meet the checks of the public op first."""
    num_tasks, rank, dim = moved["down"].shape
    shapes = [(num_tasks, rank, dim), (num_tasks, dim, rank), (2, num_tasks, rank, dim), (2, num_tasks, dim, rank)]
    for (name, tensor), shape in zip(moved.items(), shapes, strict=True):
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.dtype != moved["down"].dtype:
            raise RuntimeError(f"{name} must be contiguous {shape} in the dtype of down, got another tensor")
    if len(features) != num_tasks or len(targets) != num_tasks:
        raise RuntimeError(f"features and targets must be one tensor per task, {num_tasks}, got another number")
    for t, (x, y) in enumerate(zip(features, targets, strict=True)):
        if x.shape[1:] != (dim,) or y.shape != x.shape or x.dtype != features[0].dtype or y.dtype != x.dtype:
            raise RuntimeError(
                f"features[{t}] and targets[{t}] must be [images, {dim}] of one dtype, got another tensor"
            )
    if indices.dim() != 3 or indices.shape[1] != num_tasks or indices.shape[2] == 0 or indices.dtype != torch.int64:
        raise RuntimeError(f"indices must be int64 [steps, {num_tasks}, batch], got another tensor")


def _check_apart(moved: dict[str, Tensor], inputs: Sequence[Tensor]) -> None:
    """Tasks are written one after the other, each read before."""
    extents = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in (*moved.values(), *inputs)]
    for i, (name, (begin, end)) in enumerate(zip(moved, extents, strict=False)):
        for other_begin, other_end in extents[:i] + extents[i + 1 :]:
            if max(begin, other_begin) < min(end, other_end):
                raise RuntimeError(f"{name} must be apart from every other tensor, got memory that overlaps one")


def _check_images(features: Sequence[Tensor], indices: Tensor) -> None:
    if indices.numel() == 0:
        return
    extremes = torch.stack([indices.amin(dim=(0, 2)), indices.amax(dim=(0, 2))], dim=1)
    for t, (x, (least, most)) in enumerate(zip(features, extremes.tolist(), strict=True)):
        if least < 0 or most >= len(x):
            got = least if least < 0 else most
            raise RuntimeError(f"indices must be in [0, {len(x)}) for task {t}, got {got}")
