"""A merge that is learned: one coefficient per expert and block of parameters, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts

_ops = torch.ops.surgery_kernels


def combine(base: Tensor, task_vectors: Experts, coefficients: Tensor, block_offsets: Tensor) -> Tensor:
    """``base + sum_t coefficients[t, block(i)] * task_vectors[t, i]``, differentiable in the coefficients.

    The gradient is ``<grad, task_vectors[t]>`` over every block. Result and gradient are bit-identical on every
    instruction set, thread count and run. Forward reads base and task vectors once and writes once, backward reads the
    incoming gradient and the task vectors once; inputs that are not contiguous are copied first.

    Args:
        base: Flat parameters [num_params], float64, float32, float16 or bfloat16.
        task_vectors: List of num_tasks >= 1 tensors like `base`, or one tensor [num_tasks, num_params].
        coefficients: [num_tasks, num_blocks], float32, float64 or in the dtype of `base`; used as float32, as float64
            for a float64 `base`.
        block_offsets: [num_blocks + 1], int64: block b holds the parameters ``block_offsets[b]`` to
            ``block_offsets[b + 1]``. The first is 0, the last num_params, none is smaller than the one before; blocks
            may be empty and need no alignment.

    Returns:
        [num_params] in the dtype of `base`, rounded once. NaN and infinity propagate. Only the coefficients receive a
        gradient, in their own dtype; that of an empty block is 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ, or `base` or a task vector requires a gradient.
        RuntimeError: `block_offsets` are out of order.

    Source: AdaMerging (arXiv 2310.02575), section 3.2; aTLAS (arXiv 2407.02880).
    """
    if not isinstance(base, Tensor):
        raise TypeError(f"base must be a tensor, got {type(base).__name__}")
    _check_constants(base, task_vectors)
    _, task_vectors = arguments.check_experts(base, task_vectors, "task_vectors")
    if base.dim() != 1:
        raise ValueError(f"base must be flat, [num_params], got shape {tuple(base.shape)}")
    for name, tensor in (("coefficients", coefficients), ("block_offsets", block_offsets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != base.device:
            raise ValueError(f"{name} must be on the device of base, {base.device}, got {tensor.device}")
    if block_offsets.dtype != torch.int64:
        raise ValueError(f"block_offsets must be int64, got {block_offsets.dtype}")
    if block_offsets.dim() != 1 or block_offsets.numel() == 0:
        raise ValueError(f"block_offsets must have shape (num_blocks + 1,), got {tuple(block_offsets.shape)}")
    if coefficients.dtype not in (torch.float32, torch.float64, base.dtype):
        raise ValueError(
            f"coefficients must be float32, float64 or the dtype of base, {base.dtype}, got {coefficients.dtype}"
        )
    shape = (len(task_vectors), block_offsets.numel() - 1)
    if coefficients.shape != shape:
        raise ValueError(f"coefficients must have shape {shape}, got {tuple(coefficients.shape)}")
    compute = torch.promote_types(base.dtype, torch.float32)
    return _ops.combine(base.detach(), task_vectors, coefficients.to(compute), block_offsets)


def _check_constants(base: Tensor, task_vectors: Experts) -> None:
    """A parameter among them that silently got no gradient would never be trained."""
    listed = (
        {"task_vectors": task_vectors}
        if isinstance(task_vectors, Tensor)
        else {f"task_vectors[{t}]": task_vector for t, task_vector in enumerate(task_vectors)}
    )
    for name, tensor in {"base": base, **listed}.items():
        if torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, got one that does: detach it")


@torch.library.register_fake("surgery_kernels::combine")
def _(base: Tensor, *_: object) -> Tensor:
    return base.new_empty(base.shape)


@torch.library.register_fake("surgery_kernels::combine_backward")
def _(grad: Tensor, task_vectors: Sequence[Tensor], block_offsets: Tensor) -> Tensor:
    compute = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty((len(task_vectors), block_offsets.shape[0] - 1), dtype=compute)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    task_vectors, block_offsets = inputs[1], inputs[-1]
    ctx.save_for_backward(block_offsets, *task_vectors)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, list[None], Tensor, None]:
    block_offsets, *task_vectors = ctx.saved_tensors
    return None, [None] * len(task_vectors), _ops.combine_backward(grad, task_vectors, block_offsets), None


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    """The backward is linear in the incoming gradient, and its transpose is the forward without a base."""
    block_offsets, *task_vectors = ctx.saved_tensors
    zeros = torch.zeros_like(task_vectors[0])
    return _ops.combine(zeros, task_vectors, grad, block_offsets), [None] * len(task_vectors), None


torch.library.register_autograd("surgery_kernels::combine", _backward, setup_context=_save)
torch.library.register_autograd("surgery_kernels::combine_backward", _double_backward, setup_context=_save)
