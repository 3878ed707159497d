"""surgery_train in Triton: all steps in one launch, without a look from the host.

An adapter and its moments are 6 rank dim numbers, 196 KB at rank 16 and dim 512, and a step does 5 batch rank dim
multiply-adds on them: some ten microseconds of one multiprocessor, most of them spent on waiting for the cache. So a
task is cut along dim into slices, each with a program that keeps its columns of the adapter to itself. Twice in a step
the programs of a task meet, to add up two [batch, rank] of all slices in one order; a launch for each of the 25
operations of a step would take longer than all of it. Slices depend on shapes alone, and so do the bits.
Where batch and rank are too large for the registers of one program, the steps are made of the other ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adapter_kernels import tf32_is_wanted
from .addresses import TYPES, is_capturing, upload
from .representation_loss import representation_loss, representation_loss_backward
from .surgery_adapter import surgery_adapter, surgery_adapter_backward
from .train_kernels import LOSS_ROOM, TASK_WORDS, adam_kernel, gather_kernel, train_kernel

ADAM_BLOCK = 2048  # parameters that a program of `adam_kernel` takes

# By block of ranks and block of images: the columns of dim that a program takes at once, and its warps. As wide as
# registers allow, as every tile waits for the cache; what is not here would spill on some GPU.
TILES = {
    torch.float32: {
        16: {16: (128, 8), 32: (64, 8), 64: (32, 8), 128: (16, 4)},
        32: {16: (64, 8), 32: (32, 8), 64: (32, 8)},
        64: {16: (16, 8), 32: (16, 4)},
    },
    torch.float64: {16: {16: (16, 8), 32: (16, 8), 64: (16, 8)}, 32: {16: (16, 8), 32: (16, 4)}, 64: {}},
}
MOST_SLICES = 8


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
    images = {"STORED": TYPES[features[0].dtype], "COMPUTE": compute}
    tile = TILES[down.dtype].get(block_rank, {}).get(block_batch)
    if tile is None:
        _train_by_ops(table, numbers, moved, indices, losses, zero_grad_steps, images)
    elif steps > 0:
        block_dim, num_warps = tile
        slices = max(1, min(MOST_SLICES, triton.cdiv(dim, block_dim)))
        shared = down.new_empty(num_tasks * slices * (2 * block_batch * block_rank + LOSS_ROOM.value))
        arrived = torch.zeros(num_tasks, dtype=torch.int32, device=down.device)
        together = max(1, _multiprocessors(down.device) // slices)  # tasks: those who meet have to run at once
        for first_task in range(0, num_tasks, together):
            train_kernel[(min(together, num_tasks - first_task), slices)](
                table, numbers, down, up, down_moments, up_moments, indices, losses, shared, arrived, first_task,
                num_tasks, steps, batch, dim, rank, zero_grad_steps,
                BATCH=block_batch, BLOCK_DIM=block_dim, BLOCK_RANK=block_rank, SLICES=slices,
                **images,
                PRECISION="tf32" if tf32_is_wanted() and compute == tl.float32 else "ieee",
                # without fusion: the same bits alone and beside others
                num_warps=num_warps, num_stages=1, enable_fp_fusion=False, launch_cooperative_grid=slices > 1,
            )  # fmt: skip
    return losses


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
        gather_kernel[num_tasks, triton.cdiv(batch, 16)](
            table, batches, x, y, batch, dim, BATCH=16, BLOCK_DIM=128, **images, enable_fp_fusion=False
        )
        corrected, _, hidden = surgery_adapter(x, down, up, keep_hidden=True)
        losses[step], signs = representation_loss(corrected, y, True)
        grad = representation_loss_backward(ones, signs, down.dtype)
        _, *gradients, _ = surgery_adapter_backward(grad, None, x, down, up, None, hidden, False, True)
        for value, of_value, gradient in zip((down, up), moments, gradients, strict=True):
            numel = value.numel()
            adam_kernel[(triton.cdiv(numel, ADAM_BLOCK),)](
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
    """table: of each task the addresses of features and targets, the number of images, and whether both are multiples
    of 16, int64 [num_tasks, TASK_WORDS]; numbers: float64."""
    addresses = [
        [x.data_ptr(), y.data_ptr(), len(x), int((x.data_ptr() | y.data_ptr()) % 16 == 0)]
        for x, y in zip(features, targets, strict=True)
    ]
    t = torch.arange(1, 1 + steps * (1 + zero_grad_steps), dtype=torch.float64) + step
    corrections = torch.stack([lr / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()], dim=1)
    adam = torch.tensor([betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps], dtype=torch.float64)
    numbers = torch.cat([adam, corrections.view(-1)])
    words = torch.cat([torch.tensor(addresses).view(-1), numbers.view(torch.int64)])
    table, numbers = upload(words, features[0].device).split([TASK_WORDS.value * len(features), len(numbers)])
    return table.view(-1, TASK_WORDS.value), numbers.view(torch.float64)


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
