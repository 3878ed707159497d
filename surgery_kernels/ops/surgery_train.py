"""Training the adapters of the final representation: every step of every task in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments

_ops = torch.ops.surgery_kernels


def surgery_train(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    down: Tensor,
    up: Tensor,
    down_moments: Tensor,
    up_moments: Tensor,
    indices: Tensor,
    *,
    step: int = 0,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    zero_grad_steps: int = 0,
) -> Tensor:
    """Adam on ``mean |y - relu(y @ down.T) @ up.T - target|`` over cached features y; moves the parameters in place.

    Each step of a task gathers `batch` of its images, corrects them, and takes the loss, its gradients and one step of
    Adam; tasks do not touch each other. A run cut into several calls, or run on any number of threads, gives the same
    bits; two instruction sets differ by rounding. An image that a batch names twice counts twice.

    Args:
        features: num_tasks tensors [images, dim] of the merged model, float64, float32, float16 or bfloat16; tasks may
            differ in their number of images. What is not contiguous is copied first.
        targets: The experts' features, alike in shape and dtype.
        down: [num_tasks, rank, dim], contiguous float32 (float64 for float64 features). It may require a gradient: a
            graph that saved it notices that it moved.
        up: [num_tasks, dim, rank], as `down`.
        down_moments: [2, num_tasks, rank, dim]: Adam's first and second moments, zeros at the start.
        up_moments: [2, num_tasks, dim, rank].
        indices: int64 [steps, num_tasks, batch]: the images of each step.
        step: Steps of Adam taken before, 0 or more; those of `zero_grad_steps` count.
        lr, betas, eps: Of Adam (arXiv 1412.6980, algorithm 1); lr and eps finite and positive, betas in [0, 1).
        zero_grad_steps: Steps of Adam with a gradient of zero after each step, as when other tasks take their turns
            and gradients are zeroed instead of dropped (torch before 2.0); at most 2^20.

    Returns:
        Losses [steps, num_tasks] before each step, in the dtype of `down`. NaN in an image reaches its task alone, from
        the first step that takes the image.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers do not fit.
        RuntimeError: `indices` names an image that is not there, or what moves overlaps another tensor. Nothing has
            moved then. On CUDA the call waits for `indices` to know; while a graph is captured it cannot, and an image
            that is not there makes its task NaN.

    Source: Representation Surgery (arXiv 2402.02705), equation 5.
    """
    num_tasks, rank, dim = _check_parameters(down, up, down_moments, up_moments)
    features, targets = list(features), list(targets)
    for name, tensors in {"features": features, "targets": targets}.items():
        if len(tensors) != num_tasks:
            raise ValueError(f"{name} must be one tensor per task, {num_tasks}, got {len(tensors)}")
    for t, tensor in enumerate(features):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"features[{t}] must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2 or tensor.shape[1] != dim:
            raise ValueError(f"features[{t}] must be [images, {dim}], got {tuple(tensor.shape)}")
        if tensor.dtype not in arguments.DTYPES or tensor.dtype != features[0].dtype:
            raise ValueError(f"features[{t}] must have one floating dtype with the others, got {tensor.dtype}")
        if tensor.device != down.device:
            raise ValueError(f"features[{t}] must be on the device of down, {down.device}, got {tensor.device}")
        arguments.check_like(f"targets[{t}]", targets[t], tensor, f"features[{t}]")
    if down.dtype != torch.promote_types(features[0].dtype, torch.float32):
        raise ValueError(f"down must be float32, or float64 for float64 features, got {down.dtype}")
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64 or indices.dim() != 3 or indices.shape[1] != num_tasks or indices.shape[2] == 0:
        raise ValueError(
            f"indices must be int64 [steps, {num_tasks}, batch], got {indices.dtype} {list(indices.shape)}"
        )
    if indices.device != down.device:
        raise ValueError(f"indices must be on the device of down, {down.device}, got {indices.device}")
    for name, number in {"lr": lr, "eps": eps}.items():
        if not 0 < arguments.number(name, number) < math.inf:
            raise ValueError(f"{name} must be finite and positive, got {number}")
    if len(betas) != 2 or not all(0 <= arguments.number("betas", beta, "two numbers") < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name, count in {"step": step, "zero_grad_steps": zero_grad_steps}.items():
        if not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if count < 0:
            raise ValueError(f"{name} must be 0 or more, got {count}")
    losses = _ops.surgery_train(
        [tensor.detach() for tensor in features],
        [tensor.detach() for tensor in targets],
        *(tensor.detach() for tensor in (down, up, down_moments, up_moments)),
        indices,
        step,
        lr,
        *betas,
        eps,
        zero_grad_steps,
    )
    for moved in (down, up, down_moments, up_moments):
        torch.autograd.graph.increment_version(moved)  # a graph that saved it must notice
    return losses


def _check_parameters(down: Tensor, up: Tensor, down_moments: Tensor, up_moments: Tensor) -> tuple[int, int, int]:
    for name, tensor in {"down": down, "up": up, "down_moments": down_moments, "up_moments": up_moments}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.dtype != down.dtype:
            raise ValueError(f"{name} must have the dtype of down, {down.dtype}, got {tensor.dtype}")
        if tensor.device != down.device:
            raise ValueError(f"{name} must be on the device of down, {down.device}, got {tensor.device}")
    if down.dim() != 3 or len(down) == 0:
        raise ValueError(f"down must be [num_tasks, rank, dim] of at least one task, got {tuple(down.shape)}")
    num_tasks, rank, dim = down.shape
    shapes = {
        "up": (up, (num_tasks, dim, rank)),
        "down_moments": (down_moments, (2, num_tasks, rank, dim)),
        "up_moments": (up_moments, (2, num_tasks, dim, rank)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    return num_tasks, rank, dim


@torch.library.register_fake("surgery_kernels::surgery_train")
def _(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    down: Tensor,
    up: Tensor,
    down_moments: Tensor,
    up_moments: Tensor,
    indices: Tensor,
    *_: object,
    **__: object,
) -> Tensor:
    return down.new_empty(indices.shape[:2])
