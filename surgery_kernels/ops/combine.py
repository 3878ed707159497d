"""A merge that is learned: coefficients of experts and blocks of parameters, a mask over them, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts
from .masks import check_seed

MOST_GROUPS = 256
LEAST_MEAN = 1e-12  # that a mask is divided by
SHARPEST = 1e300  # in place of 1 / temperature at 0
MASK_STREAM, GROUPS_STREAM = 0, 1  # of the words: their task_id in csrc/philox.h, where the tensor_id is the block

_ops = torch.ops.surgery_kernels


def combine(
    base: Tensor,
    task_vectors: Experts,
    coefficients: Tensor,
    block_offsets: Tensor,
    *,
    mask_logits: Tensor | None = None,
    temperature: float = 0.5,
    seed: int | None = 0,
) -> Tensor:
    """``base[i] + m[i] / mean(m[block(i)]) * sum_t coefficients[t, block(i)] * task_vectors[t, i]``, differentiable.

    Without `mask_logits` m is 1. With them it is a relaxed Bernoulli variable for each parameter, shared by all task
    vectors, ``sigmoid((mask_logits + log(u / (1 - u))) / temperature)``, u uniform in (0, 1). u comes from a counter
    keyed by seed, block and place within the block: it is computed again in the backward and never stored.

    With coefficients [num_tasks, num_blocks, num_groups] every block is parted at random, by the same kind of counter,
    into groups of about equal size with a coefficient each.

    Result and gradients are bit-identical on every instruction set, thread count and run. Forward reads base and task
    vectors once and writes once, and reads the logits once; backward reads the incoming gradient, the task vectors and
    the logits once, and the logits once more. Inputs that are not contiguous are copied first.

    Args:
        base: Flat parameters [num_params], float64, float32, float16 or bfloat16.
        task_vectors: List of num_tasks >= 1 tensors like `base`, or one tensor [num_tasks, num_params].
        coefficients: [num_tasks, num_blocks], or with 1 to 256 groups [num_tasks, num_blocks, num_groups]; float32,
            float64 or in the dtype of `base`; used as float32, as float64 for a float64 `base`.
        block_offsets: [num_blocks + 1], int64: block b holds the parameters ``block_offsets[b]`` to
            ``block_offsets[b + 1]``. The first is 0, the last num_params, none is smaller than the one before; blocks
            may be empty and need no alignment.
        mask_logits: [num_params], in a dtype that `coefficients` may have. None: no mask.
        temperature: Of the mask, 0 or greater. 0: every m is 0 or 1, and 1 with probability sigmoid(mask_logits);
            then the logits' gradient is 0.
        seed: Of the mask or of the groups, any integer of 64 bits. None, of a mask: u = 1/2, so that m is
            sigmoid(mask_logits / temperature), or at temperature 0 whether mask_logits > 0.

    Returns:
        [num_params] in the dtype of `base`, rounded once. NaN and infinity propagate, those of a logit throughout its
        block. Coefficients and logits receive gradients, in their own dtypes; that of an empty block is 0. The mean of
        a mask counts as 1e-12 at least. A masked merge is differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ, `base` or a task vector requires a gradient, or there
            are both groups and a mask.
        RuntimeError: `block_offsets` are out of order.

    Source: AdaMerging (arXiv 2310.02575), section 3.2; aTLAS (arXiv 2407.02880), x K with groups; Concrete subspace
        learning (arXiv 2312.06173) with a mask.
    """
    if not isinstance(base, Tensor):
        raise TypeError(f"base must be a tensor, got {type(base).__name__}")
    _check_constants(base, task_vectors)
    _, task_vectors = arguments.check_experts(base, task_vectors, "task_vectors")
    if base.dim() != 1:
        raise ValueError(f"base must be flat, [num_params], got shape {tuple(base.shape)}")
    others = {"coefficients": coefficients, "block_offsets": block_offsets}
    if mask_logits is not None:
        others["mask_logits"] = mask_logits
    for name, tensor in others.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != base.device:
            raise ValueError(f"{name} must be on the device of base, {base.device}, got {tensor.device}")
    if block_offsets.dtype != torch.int64:
        raise ValueError(f"block_offsets must be int64, got {block_offsets.dtype}")
    if block_offsets.dim() != 1 or block_offsets.numel() == 0:
        raise ValueError(f"block_offsets must have shape (num_blocks + 1,), got {tuple(block_offsets.shape)}")
    for name, tensor in others.items():
        if name != "block_offsets" and tensor.dtype not in (torch.float32, torch.float64, base.dtype):
            raise ValueError(f"{name} must be float32, float64 or the dtype of base, {base.dtype}, got {tensor.dtype}")
    shape = (len(task_vectors), block_offsets.numel() - 1)
    grouped = coefficients.dim() == 3
    if coefficients.shape[:2] != shape or not (grouped or coefficients.dim() == 2):
        raise ValueError(f"coefficients must have shape {shape}, got {tuple(coefficients.shape)}")
    if grouped and not 1 <= coefficients.shape[2] <= MOST_GROUPS:
        raise ValueError(f"coefficients must be of 1 to {MOST_GROUPS} groups, got shape {tuple(coefficients.shape)}")
    if mask_logits is not None and grouped:
        raise ValueError("coefficients must have no groups with mask_logits, got both")
    if seed is not None or mask_logits is None:
        seed = check_seed(seed)
    compute = arguments.compute_dtype(base)
    base, coefficients = base.detach(), coefficients.to(compute)
    if mask_logits is not None:
        if mask_logits.shape != base.shape:
            raise ValueError(f"mask_logits must have shape {tuple(base.shape)}, got {tuple(mask_logits.shape)}")
        temperature = arguments.number("temperature", temperature)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and 0 or greater, got {temperature}")
        logits = mask_logits.to(compute)
        return _ops.combine_masked(base, task_vectors, coefficients, block_offsets, logits, temperature, seed)[0]
    if grouped:
        return _ops.combine_grouped(base, task_vectors, coefficients, block_offsets, seed)
    return _ops.combine(base, task_vectors, coefficients, block_offsets)


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
    return grad.new_empty((len(task_vectors), block_offsets.shape[0] - 1), dtype=arguments.compute_dtype(grad))


@torch.library.register_fake("surgery_kernels::combine_grouped")
def _(base: Tensor, *_: object) -> Tensor:
    return base.new_empty(base.shape)


@torch.library.register_fake("surgery_kernels::combine_grouped_backward")
def _(grad: Tensor, task_vectors: Sequence[Tensor], block_offsets: Tensor, num_groups: int, seed: int) -> Tensor:
    return grad.new_empty(
        (len(task_vectors), block_offsets.shape[0] - 1, num_groups), dtype=arguments.compute_dtype(grad)
    )


@torch.library.register_fake("surgery_kernels::combine_masked")
def _(
    base: Tensor, task_vectors: Sequence[Tensor], coefficients: Tensor, block_offsets: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), base.new_empty(block_offsets.shape[0] - 1, dtype=torch.float64)


@torch.library.register_fake("surgery_kernels::combine_masked_backward")
def _(grad: Tensor, task_vectors: Sequence[Tensor], coefficients: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    compute = arguments.compute_dtype(grad)
    return grad.new_empty(coefficients.shape, dtype=compute), grad.new_empty(grad.shape, dtype=compute)


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


def _save_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, task_vectors, coefficients, block_offsets, ctx.seed = inputs
    ctx.num_groups = coefficients.shape[2]
    ctx.save_for_backward(block_offsets, *task_vectors)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[None, list[None], Tensor, None, None]:
    block_offsets, *task_vectors = ctx.saved_tensors
    of_coefficients = _ops.combine_grouped_backward(grad, task_vectors, block_offsets, ctx.num_groups, ctx.seed)
    return None, [None] * len(task_vectors), of_coefficients, None, None


def _save_grouped_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, task_vectors, block_offsets, _, ctx.seed = inputs
    ctx.save_for_backward(block_offsets, *task_vectors)


def _grouped_double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None, None, None]:
    block_offsets, *task_vectors = ctx.saved_tensors
    zeros = torch.zeros_like(task_vectors[0])
    merged = _ops.combine_grouped(zeros, task_vectors, grad, block_offsets, ctx.seed)
    return merged, [None] * len(task_vectors), None, None, None


torch.library.register_autograd("surgery_kernels::combine_grouped", _grouped_backward, setup_context=_save_grouped)
torch.library.register_autograd(
    "surgery_kernels::combine_grouped_backward", _grouped_double_backward, setup_context=_save_grouped_backward
)


def _save_masked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, task_vectors, coefficients, block_offsets, mask_logits, ctx.temperature, ctx.seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(coefficients, block_offsets, mask_logits, output[1], *task_vectors)


def _masked_backward(ctx: Any, grad: Tensor, _: object) -> tuple[Any, ...]:
    coefficients, block_offsets, mask_logits, means, *task_vectors = ctx.saved_tensors
    of_coefficients, of_logits = _ops.combine_masked_backward(
        grad, task_vectors, coefficients, block_offsets, mask_logits, means, ctx.temperature, ctx.seed
    )
    return None, [None] * len(task_vectors), of_coefficients, None, of_logits, None, None


def _no_double_backward(ctx: Any, *_: object) -> None:
    raise RuntimeError("combine with mask_logits must be differentiated once, got a second time")


torch.library.register_autograd("surgery_kernels::combine_masked", _masked_backward, setup_context=_save_masked)
torch.library.register_autograd("surgery_kernels::combine_masked_backward", _no_double_backward)
