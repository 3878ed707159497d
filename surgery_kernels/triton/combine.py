"""base + sum_t coefficients[t, block] * task_vectors[t] on CUDA tensors, and the gradient of the coefficients.

Blocks of parameters lie anywhere: their offsets stay on the device, where every program finds the blocks of its chunk.
The gradient is the same in every run: a chunk writes its part of every block, and the parts are added up in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .addresses import BASE, CHUNK, EXPERTS, OUT, Scope, is_capturing, is_whole, load, locate, store, whole_blocks

BLOCK = 1024
TOGETHER = 4  # experts whose products with the gradient are added up side by side: then threads wait for one another
CHUNKS_AT_ONCE = 256  # of a block of parameters, whose parts are added up together

_in_order: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # block_offsets to what was checked of them


@triton.jit
def _block_of(block_offsets, num_blocks, index):
    """The last block that starts at `index` or before."""
    low = tl.zeros([], tl.int32)
    high = low + num_blocks - 1
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.load(block_offsets + middle) <= index
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def _blocks_of(block_offsets, num_blocks, block_bits, index):
    """The same for many indices."""
    low = tl.zeros_like(index).to(tl.int32)
    high = low + num_blocks - 1
    for _ in range(block_bits):
        middle = (low + high + 1) // 2
        before = tl.load(block_offsets + middle) <= index
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def _combine_block(
    row, at, left, num_tasks, coefficients, num_blocks, block,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`block`: of all elements, or of each."""
    lanes = tl.arange(0, BLOCK)
    base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, WHOLE)
    sum = tl.zeros([BLOCK], COMPUTE)
    for t in tl.range(num_tasks, loop_unroll_factor=4):
        x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, COMPUTE, WHOLE)
        sum = sum + x * tl.load(coefficients + t * num_blocks + block)
    store(base + sum, tl.load(row + OUT), at, lanes, left, STORED, WHOLE)


@triton.jit
def _combine(
    table, num_parts, columns, num_tasks, coefficients, block_offsets, num_blocks, block_bits,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    block = _block_of(block_offsets, num_blocks, begin)
    if begin + count <= tl.load(block_offsets + block + 1):
        whole = whole_blocks(row, count, BLOCK)
        for at in range(0, whole, BLOCK):
            _combine_block(
                row, begin + at, BLOCK, num_tasks, coefficients, num_blocks, block, STORED, COMPUTE, True, BLOCK,
            )  # fmt: skip
        for at in range(whole, count, BLOCK):
            _combine_block(
                row, begin + at, count - at, num_tasks, coefficients, num_blocks, block, STORED, COMPUTE, False, BLOCK,
            )  # fmt: skip
    else:
        for at in range(0, count, BLOCK):
            index = begin + at + tl.arange(0, BLOCK)
            _combine_block(
                row, begin + at, count - at, num_tasks, coefficients, num_blocks,
                _blocks_of(block_offsets, num_blocks, block_bits, index),
                STORED, COMPUTE, False, BLOCK,
            )  # fmt: skip


@triton.jit
def _dots(
    row, begin, first, last, num_tasks, block, chunk, starts_before, ends_after, gradient, begun, continued,
    num_blocks, num_chunks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """<grad, task_vectors[t]> over the elements `first` to `last` of the chunk, some experts at a time.

    What it adds to a block: all of its gradient, or a part of a block that begins before the chunk or ends after it.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    for before in range(0, num_tasks, TOGETHER):
        tasks = before + tl.arange(0, TOGETHER)
        known = tl.minimum(tasks, num_tasks - 1).to(tl.int64)  # what is beyond is the last again
        experts = tl.load(row + EXPERTS + known)[:, None]
        sums = tl.zeros([TOGETHER, BLOCK], COMPUTE)
        for at in range(first // BLOCK * BLOCK, last, BLOCK):
            grad = load(tl.load(row + BASE), begin + at, lanes, last - at, STORED, COMPUTE, WHOLE)
            product = grad * load(experts, begin + at, lanes, last - at, STORED, COMPUTE, WHOLE)
            if not WHOLE:
                product = tl.where((at + lanes >= first) & (at + lanes < last), product, 0.0)
            sums += product
        parts = tl.sum(sums, axis=1)
        if starts_before:
            tl.store(continued + chunk + known * num_chunks, parts, mask=tasks < num_tasks)
        elif ends_after:
            tl.store(begun + chunk + known * num_chunks, parts, mask=tasks < num_tasks)
        else:
            tl.store(gradient + block + known * num_blocks, parts, mask=tasks < num_tasks)


@triton.jit
def _differentiate(
    table, num_parts, columns, num_tasks, gradient, begun, continued, block_offsets, num_blocks, num_chunks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The gradient of the blocks inside this chunk, and its part of those that begin before it or end after it."""
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    end = begin + count
    chunk = tl.program_id(0)
    block = _block_of(block_offsets, num_blocks, begin)
    starts_before, stop = tl.load(block_offsets + block) < begin, tl.load(block_offsets + block + 1)
    if is_whole(row, count, CHUNK) & (stop >= end):
        _dots(
            row, begin, 0, CHUNK, num_tasks, block, chunk, starts_before, stop > end, gradient, begun, continued,
            num_blocks, num_chunks, STORED, COMPUTE, True, BLOCK, TOGETHER,
        )  # fmt: skip
    else:
        at = begin
        while at < end:
            start, stop = tl.load(block_offsets + block), tl.load(block_offsets + block + 1)
            if stop > at:
                first, last = (at - begin).to(tl.int32), (tl.minimum(stop, end) - begin).to(tl.int32)
                _dots(
                    row, begin, first, last, num_tasks, block, chunk, start < begin, stop > end, gradient, begun,
                    continued, num_blocks, num_chunks, STORED, COMPUTE, False, BLOCK, TOGETHER,
                )  # fmt: skip
                at = tl.minimum(stop, end)
            block += 1


@triton.jit
def _sum_parts(
    gradient, begun, continued, block_offsets, num_blocks, num_chunks,
    COMPUTE: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The gradient of a block that spans chunks."""
    block, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, stop = tl.load(block_offsets + block), tl.load(block_offsets + block + 1)
    first, last = start // CHUNK, (stop - 1) // CHUNK
    if (start < stop) & (first < last):
        sums = tl.zeros([AT_ONCE], tl.float64)
        for at in range(first + 1, last + 1, AT_ONCE):
            chunks = at + tl.arange(0, AT_ONCE)
            sums += tl.load(continued + t * num_chunks + chunks, mask=chunks <= last, other=0.0).to(tl.float64)
        total = tl.sum(sums) + tl.load(begun + t * num_chunks + first).to(tl.float64)
        tl.store(gradient + t * num_blocks + block, total.to(COMPUTE))


def combine(base: Tensor, task_vectors: Sequence[Tensor], coefficients: Tensor, block_offsets: Tensor) -> Tensor:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    scope = Scope([base], task_vectors, len(task_vectors), [out])
    block_offsets = checked_offsets(block_offsets, scope)
    num_blocks = len(block_offsets) - 1
    if coefficients.shape != (scope.num_tasks, num_blocks) or coefficients.device != scope.device:
        raise RuntimeError(
            f"coefficients must be [{scope.num_tasks}, {num_blocks}] on {scope.device}, got another shape or device"
        )
    if coefficients.dtype != scope.compute:
        raise RuntimeError("coefficients must be in the compute type, got another dtype")
    (group,) = scope.groups
    _combine[(group.num_chunks,)](
        *group.place, scope.num_tasks, coefficients.contiguous(), block_offsets, num_blocks,
        max(0, num_blocks - 1).bit_length(), **group.dtypes, CHUNK=CHUNK, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def combine_backward(grad: Tensor, task_vectors: Sequence[Tensor], block_offsets: Tensor) -> Tensor:
    scope = Scope([grad], task_vectors, len(task_vectors))
    block_offsets = checked_offsets(block_offsets, scope)
    num_blocks = len(block_offsets) - 1
    gradient = torch.zeros(scope.num_tasks, num_blocks, dtype=scope.compute, device=scope.device)
    (group,) = scope.groups
    begun, continued = torch.empty(2, scope.num_tasks * group.num_chunks, dtype=scope.compute, device=scope.device)
    _differentiate[(group.num_chunks,)](
        *group.place, scope.num_tasks, gradient, begun, continued, block_offsets, num_blocks, group.num_chunks,
        **group.dtypes, CHUNK=CHUNK, BLOCK=BLOCK, TOGETHER=min(TOGETHER, triton.next_power_of_2(scope.num_tasks)),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _sum_parts[(num_blocks, scope.num_tasks)](
        gradient, begun, continued, block_offsets, num_blocks, group.num_chunks, COMPUTE=group.dtypes["COMPUTE"],
        CHUNK=CHUNK, AT_ONCE=CHUNKS_AT_ONCE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return gradient


def checked_offsets(block_offsets: Tensor, scope: Scope) -> Tensor:
    """Contiguous, and in order: the host looks at a tensor once, and not while a CUDA graph is captured."""
    if block_offsets.dtype != torch.int64 or block_offsets.dim() != 1 or block_offsets.numel() == 0:
        raise RuntimeError("block_offsets must be int64 [num_blocks + 1], got another dtype or shape")
    if block_offsets.device != scope.device:
        raise RuntimeError(f"block_offsets must be on {scope.device}, got {block_offsets.device}")
    version = None if block_offsets.is_inference() else block_offsets._version
    known = version is not None and _in_order.get(block_offsets) == (version, scope.numel)
    if not known and not is_capturing(scope.device):
        _check_order(block_offsets.tolist(), scope.numel)
        _in_order[block_offsets] = (version, scope.numel)
    return block_offsets.contiguous()


def _check_order(offsets: list[int], num_params: int) -> None:
    if offsets[0] != 0:
        raise RuntimeError(f"block_offsets must start at 0, got {offsets[0]}")
    for before, after in zip(offsets, offsets[1:], strict=False):
        if after < before:
            raise RuntimeError(f"block_offsets must not decrease, got {after} after {before}")
    if offsets[-1] != num_params:
        raise RuntimeError(f"block_offsets must end at the number of parameters, {num_params}, got {offsets[-1]}")
