"""The low-rank adapter of representation surgery, batched over tasks. Forward and backward read each row once."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import arguments

_ops = torch.ops.surgery_kernels


ACTIVATIONS = ("relu", "none")


@overload
def surgery_adapter(
    features: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    task_index: Tensor | None = ...,
    token_mean: Literal[False] = ...,
    bias: Tensor | None = ...,
    activation: str = ...,
) -> Tensor: ...
@overload
def surgery_adapter(
    features: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    task_index: Tensor | None = ...,
    token_mean: Literal[True],
    bias: Tensor | None = ...,
    activation: str = ...,
) -> tuple[Tensor, Tensor]: ...


def surgery_adapter(
    features: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    task_index: Tensor | None = None,
    token_mean: bool = False,
    bias: Tensor | None = None,
    activation: str = "relu",
) -> Tensor | tuple[Tensor, Tensor]:
    """``features - relu(features @ down.T) @ up.T - bias``, every task with its own adapter, in one call.

    Products and sums run in float32 (float64 for float64 features), relu has gradient 0 at 0. Results do not depend on
    the number of threads; those of two instruction sets differ by rounding.

    On CUDA sums are the same, and products take what tensor cores take: bfloat16 for bfloat16 adapters, else TF32 (10
    bits of mantissa, the range of float32) for float16 and bfloat16 features or where
    ``torch.backends.cuda.matmul.fp32_precision`` is "tf32", else float32 or float64. Under ``torch.autocast("cuda",
    torch.bfloat16)`` float32 adapters are cast like the weights of ``nn.Linear``, while corrected features keep the
    dtype of `features`; under float16, which would lose small gradients, they are not.

    Args:
        features: [num_tasks, rows, dim] or [num_tasks, batch, tokens, dim], or with `task_index` [rows, dim] or
            [rows, tokens, dim]; float64, float32, float16 or bfloat16. Any strides with the last one 1: activations
            [tokens, num_tasks * batch, dim] go in as a view; others are copied first.
        down: [num_tasks, rank, dim], in the dtype of `features` or float32.
        up: [num_tasks, dim, rank], as `down`.
        task_index: int64 [rows]: the task of each row, in any order.
        token_mean: Also return the mean of the corrected features over the tokens, taken before they are rounded.
        bias: [num_tasks, dim], in the dtype of `down`; None: there is none.
        activation: "relu", or "none": a linear map.

    Returns:
        Corrected features with the shape, dtype and strides of `features`, contiguous where those overlap; with
        `token_mean` also the means, [num_tasks, batch, dim] or [rows, dim], NaN where there are no tokens.
        Differentiable once, in `features`, `down`, `up` and `bias`. NaN in a row reaches that row alone, its mean, and
        the gradients of its task's adapter.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
        RuntimeError: `task_index` holds a number outside [0, num_tasks), or a gradient's gradient is asked for. On CUDA
            rows with such a number become NaN instead: to look would wait for the device.

    Source: Representation Surgery (arXiv 2402.02705), equation 4; SurgeryV2 (arXiv 2410.14389), section 4.
    """
    _check(features, down, up, task_index, token_mean, bias)
    arguments.check_one_of("activation", activation, ACTIVATIONS)
    if features.stride(-1) != 1:
        features = features.contiguous()
    differentiated = (features, down, up) if bias is None else (features, down, up, bias)
    keep_hidden = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiated)
    dtype = _adapter_dtype(features, down)
    corrected, means, _ = _ops.surgery_adapter(
        features,
        down.to(dtype),
        up.to(dtype),
        task_index,
        token_mean,
        keep_hidden,
        None if bias is None else bias.to(torch.promote_types(features.dtype, torch.float32)),
        activation,
    )
    return (corrected, means.to(features.dtype)) if token_mean else corrected


def _adapter_dtype(features: Tensor, down: Tensor) -> torch.dtype:
    """What the backend is given: it says what products are made of."""
    compute = torch.promote_types(features.dtype, torch.float32)
    if not features.is_cuda or compute == torch.float64:
        return compute
    if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
        return torch.bfloat16
    return down.dtype


def _check(
    features: Tensor, down: Tensor, up: Tensor, task_index: Tensor | None, token_mean: bool, bias: Tensor | None
) -> None:
    given = {"features": features, "down": down, "up": up}
    for name, tensor in (given if bias is None else {**given, "bias": bias}).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on the device of features, {features.device}, got {tensor.device}")
    if features.dtype not in arguments.DTYPES:
        raise ValueError(f"features must be float64, float32, float16 or bfloat16, got {features.dtype}")
    if down.dim() != 3:
        raise ValueError(f"down must be [num_tasks, rank, dim], got {tuple(down.shape)}")
    num_tasks, rank, dim = down.shape
    if up.shape != (num_tasks, dim, rank):
        raise ValueError(f"up must have shape {(num_tasks, dim, rank)}, got {tuple(up.shape)}")
    if bias is not None and bias.shape != (num_tasks, dim):
        raise ValueError(f"bias must have shape {(num_tasks, dim)}, got {tuple(bias.shape)}")
    for name, tensor in ({"down": down, "up": up} if bias is None else {"down": down, "up": up, "bias": bias}).items():
        if tensor.dtype not in (features.dtype, torch.float32) or tensor.dtype != down.dtype:
            raise ValueError(f"{name} must be {features.dtype} like features, or float32, got {tensor.dtype}")
    if task_index is not None and not isinstance(task_index, Tensor):
        raise TypeError(f"task_index must be a tensor, got {type(task_index).__name__}")
    axes = ["rows", "batch, tokens"] if task_index is None else ["rows", "rows, tokens"]
    shapes = [f"[{'num_tasks, ' if task_index is None else ''}{axis}, dim]" for axis in axes[token_mean:]]
    if features.dim() not in [shape.count(",") + 1 for shape in shapes]:
        raise ValueError(f"features must be {' or '.join(shapes)}, got {tuple(features.shape)}")
    if features.shape[-1] != dim:
        raise ValueError(f"features must have the dim of down, {dim}, got {features.shape[-1]}")
    if task_index is None:
        if features.shape[0] != num_tasks:
            raise ValueError(f"features must have the num_tasks of down, {num_tasks}, got {features.shape[0]}")
        return
    if task_index.dtype != torch.int64 or task_index.shape != features.shape[:1]:
        raise ValueError(
            f"task_index must be int64 [{features.shape[0]}], got {task_index.dtype} {list(task_index.shape)}"
        )
    if task_index.device != features.device:
        raise ValueError(f"task_index must be on the device of features, {features.device}, got {task_index.device}")


def _empty_like_rows(features: Tensor) -> Tensor:
    """In the layout of `features`, unless their rows overlap: then torch may put another dimension last."""
    like = torch.empty_like(features)
    return like if like.shape[-1] < 2 or like.stride(-1) == 1 else features.new_empty(features.shape)


@torch.library.register_fake("surgery_kernels::surgery_adapter")
def _(
    features: Tensor,
    down: Tensor,
    up: Tensor,
    task_index: Tensor | None = None,
    token_mean: bool = False,
    keep_hidden: bool = False,
    bias: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    means = (*features.shape[:-2], features.shape[-1]) if token_mean else (0,)
    hidden = (features.shape[:-1].numel(), down.shape[1]) if keep_hidden else (0,)
    compute = torch.promote_types(features.dtype, torch.float32)
    return (
        _empty_like_rows(features),
        features.new_empty(means, dtype=compute),
        features.new_empty(hidden, dtype=compute),
    )


@torch.library.register_fake("surgery_kernels::surgery_adapter_backward")
def _(
    grad: Tensor | None,
    grad_means: Tensor | None,
    features: Tensor,
    down: Tensor,
    up: Tensor,
    task_index: Tensor | None,
    hidden: Tensor,
    need_features: bool,
    need_adapter: bool,
    need_bias: bool = False,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(features.dtype, torch.float32)
    return (
        _empty_like_rows(features) if need_features else features.new_empty(0),
        torch.empty_like(down, memory_format=torch.contiguous_format) if need_adapter else down.new_empty(0),
        torch.empty_like(up, memory_format=torch.contiguous_format) if need_adapter else up.new_empty(0),
        down.new_empty((len(down), down.shape[2]) if need_bias else 0, dtype=compute),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, down, up, task_index, token_mean, _, _, activation = inputs
    ctx.save_for_backward(features, down, up, task_index, output[2])
    ctx.token_mean, ctx.activation = token_mean, activation
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_means: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_means = grad_means if ctx.token_mean else None
    if grad is None and grad_means is None:
        return (None,) * 8
    need_features, need_down, need_up, *others = ctx.needs_input_grad
    need_bias = any(others)  # the one tensor among them; torch leaves out arguments with their defaults
    features, down, up, task_index, hidden = ctx.saved_tensors
    d_features, d_down, d_up, d_bias = _ops.surgery_adapter_backward(
        grad,
        grad_means,
        features,
        down,
        up,
        task_index,
        hidden,
        need_features,
        need_down or need_up,
        need_bias,
        ctx.activation,
    )
    needed = zip((d_features, d_down, d_up), (need_features, need_down, need_up), strict=True)
    of_three = (gradient if need else None for gradient, need in needed)
    return *of_three, None, None, None, d_bias if need_bias else None, None


def _refuse_twice(*_: object) -> None:
    raise RuntimeError("surgery_adapter must be differentiated once, got a gradient of its gradient")


torch.library.register_autograd("surgery_kernels::surgery_adapter", _backward, setup_context=_keep)
torch.library.register_autograd("surgery_kernels::surgery_adapter_backward", _refuse_twice)
