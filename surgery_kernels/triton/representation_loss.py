"""representation_loss and its gradient in Triton: one launch each, two for means of many elements.

Differences are float32 (float64 for float64 features). A program adds up a chunk in a fixed order, and the chunks of a
mean are added in float64: the same call gives the same bits every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import TYPES, divide

BLOCK = 4096  # elements in registers
CHUNK = 4 * BLOCK  # elements a program goes through
NUM_WARPS = 8


@triton.jit
def _loss_kernel(
    features, targets, signs, sums, numel, chunks, divisor,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The sum of |features - targets| over one chunk of one mean, over `divisor`, and the signs.

    Bound: reads features and targets once; writes a byte an element where signs are wanted.
    """
    mean = tl.program_id(0) // chunks
    begin = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    first = mean.to(tl.int64) * numel
    total = tl.zeros((BLOCK,), dtype=COMPUTE)
    for start in range(begin, tl.minimum(begin + CHUNK, numel), BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < numel
        x = tl.load(features + first + at, mask=mask, other=0.0).to(COMPUTE)
        x -= tl.load(targets + first + at, mask=mask, other=0.0).to(COMPUTE)
        total += tl.abs(x)
        if signs is not None:
            sign = (x > 0).to(tl.int8) - (x < 0).to(tl.int8)
            tl.store(signs + first + at, tl.where(x == x, sign, -2), mask=mask)
    tl.store(sums + tl.program_id(0), tl.sum(total.to(tl.float64)) / divisor)


@triton.jit
def _mean_kernel(sums, loss, chunks, divisor, BLOCK: tl.constexpr):
    """Adds up the chunks of one mean."""
    mean = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums + mean.to(tl.int64) * chunks + at, mask=at < chunks, other=0.0)
    tl.store(loss + mean, tl.sum(total) / divisor)


@triton.jit
def _gradient_kernel(
    grad, signs, gradient, numel, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr
):
    """gradient = signs * grad / numel, NaN for the sign -2, over one chunk of one mean.

    Bound: reads a byte an element and writes the gradient.
    """
    mean = tl.program_id(0) // chunks
    begin = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    first = mean.to(tl.int64) * numel
    scale = divide(tl.load(grad + mean + tl.zeros((1,), tl.int32)), tl.zeros((1,), COMPUTE) + numel)
    for start in range(begin, tl.minimum(begin + CHUNK, numel), BLOCK):
        at = start + tl.arange(0, BLOCK)
        sign = tl.load(signs + first + at, mask=at < numel, other=0)
        value = tl.where(sign == -2, float("nan"), sign.to(COMPUTE) * scale)
        tl.store(gradient + first + at, value, mask=at < numel)


def representation_loss(features: Tensor, targets: Tensor, with_signs: bool) -> tuple[Tensor, Tensor]:
    """mean |features - targets| over the last two dimensions, and the signs of the differences or an empty tensor."""
    if targets.shape != features.shape or targets.dtype != features.dtype or targets.device != features.device:
        raise RuntimeError("targets must have the shape, dtype and device of features, got another")
    features, targets = features.contiguous(), targets.contiguous()
    compute = torch.promote_types(features.dtype, torch.float32)
    loss = features.new_empty(features.shape[:-2], dtype=compute)
    signs = features.new_empty(features.shape if with_signs else (0,), dtype=torch.int8)
    numel = features.shape[-2:].numel()
    if numel == 0:
        return loss.fill_(torch.nan), signs  # as torch's mean of nothing
    chunks = triton.cdiv(numel, CHUNK)
    sums = loss if chunks == 1 else features.new_empty(loss.numel() * chunks, dtype=torch.float64)
    if loss.numel() > 0:
        _loss_kernel[(loss.numel() * chunks,)](
            features, targets, signs if with_signs else None, sums, numel, chunks, numel if chunks == 1 else 1,
            CHUNK=CHUNK, BLOCK=BLOCK, COMPUTE=TYPES[compute], num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
        if chunks > 1:
            _mean_kernel[(loss.numel(),)](sums, loss, chunks, numel, BLOCK=128, num_warps=1, enable_fp_fusion=True)
    return loss, signs


def representation_loss_backward(grad: Tensor, signs: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of features: signs * grad / (rows * dim)."""
    numel, means = signs.shape[-2:].numel(), signs.shape[:-2].numel()
    if grad.numel() != means or signs.dtype != torch.int8:
        raise RuntimeError(
            f"grad must be one value for each of {means} means with int8 signs, got {grad.numel()} and {signs.dtype}"
        )
    grad, signs = grad.contiguous(), signs.contiguous()
    gradient = signs.new_empty(signs.shape, dtype=dtype)
    if gradient.numel() > 0:
        chunks = triton.cdiv(numel, CHUNK)
        _gradient_kernel[(means * chunks,)](
            grad, signs, gradient, numel, chunks,
            CHUNK=CHUNK, BLOCK=BLOCK, COMPUTE=TYPES[torch.promote_types(dtype, torch.float32)], num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return gradient
