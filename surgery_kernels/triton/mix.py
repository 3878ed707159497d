"""Linear combinations on CUDA tensors: one read of base and experts for all outputs, one rounding each."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from ..ops.mix import AXES, num_blocks_of
from .addresses import BASE, CHUNK, EXPERTS, Scope, divide, load, locate, pointer_to, upload, whole_blocks
from .finite import INFINITY_STORED, FiniteCheck, is_finite, key_of

SUMS = 8192  # a program holds of all outputs together


@triton.jit
def _mix(
    table, num_parts, columns, num_tasks, num_outputs, coefficients, base_coefficients, num_blocks, numbers, nonfinite,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, SCALED_BASE: tl.constexpr,
    SUBTRACT: tl.constexpr, DIVIDE: tl.constexpr, FUSED: tl.constexpr, PLACED: tl.constexpr, IN_PLACE: tl.constexpr,
    DROP: tl.constexpr, CHECKED: tl.constexpr, LOOK: tl.constexpr, CHUNK: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """OUTPUTS: a power of two from num_outputs on. PLACED: a chunk may have several blocks of coefficients.

    CHECKED: nothing is written where `nonfinite` was counted before. LOOK: the key from which on a chunk that has some
    is counted here, or 0.
    """
    if CHECKED:  # noqa: SIM102  # there is no pointer to load from otherwise
        if tl.load(nonfinite) != 0:
            return
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    place = row + EXPERTS + num_tasks + num_outputs
    block, step, num_of_part = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    one_block = True
    if PLACED:
        one_block = (num_of_part == 1) | (begin // step == (begin + count - 1) // step)
        block += begin // step % num_of_part
    largest = key_of(tl.zeros([1, BLOCK], COMPUTE))
    if one_block:
        whole = whole_blocks(row, count, BLOCK)
        for at in range(0, whole, BLOCK):
            largest = _mix_block(
                row, begin + at, BLOCK, num_tasks, num_outputs, coefficients, base_coefficients, num_blocks, block,
                numbers, STORED, COMPUTE, HAS_BASE, SCALED_BASE, SUBTRACT, DIVIDE, FUSED, IN_PLACE, DROP, LOOK, True,
                OUTPUTS, BLOCK, largest,
            )  # fmt: skip
        for at in range(whole, count, BLOCK):
            largest = _mix_block(
                row, begin + at, count - at, num_tasks, num_outputs, coefficients, base_coefficients, num_blocks,
                block, numbers, STORED, COMPUTE, HAS_BASE, SCALED_BASE, SUBTRACT, DIVIDE, FUSED, IN_PLACE, DROP, LOOK,
                False, OUTPUTS, BLOCK, largest,
            )  # fmt: skip
    else:
        first = tl.load(place)
        for at in range(0, count, BLOCK):
            index = begin + at + tl.arange(0, BLOCK)[None, :]
            largest = _mix_block(
                row, begin + at, count - at, num_tasks, num_outputs, coefficients, base_coefficients, num_blocks,
                first + index // step % num_of_part, numbers, STORED, COMPUTE, HAS_BASE, SCALED_BASE, SUBTRACT, DIVIDE,
                FUSED, IN_PLACE, DROP, LOOK, False, OUTPUTS, BLOCK, largest,
            )  # fmt: skip
    if LOOK:  # noqa: SIM102  # there is no pointer to add to otherwise
        if tl.max(largest) >= LOOK:
            tl.atomic_add(nonfinite, tl.full([], 1, tl.int64), sem="relaxed")


@triton.jit
def _mix_block(
    row, at, left, num_tasks, num_outputs, coefficients, base_coefficients, num_blocks, block, numbers,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, SCALED_BASE: tl.constexpr,
    SUBTRACT: tl.constexpr, DIVIDE: tl.constexpr, FUSED: tl.constexpr, IN_PLACE: tl.constexpr, DROP: tl.constexpr,
    LOOK: tl.constexpr, WHOLE: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr, largest,
):  # fmt: skip
    """`block`: of all elements, or of each. Returns `largest` or, LOOK, the larger keys here.  # [1, BLOCK]"""
    lanes = tl.arange(0, BLOCK)[None, :]
    outputs = tl.arange(0, OUTPUTS)[:, None]
    known = tl.minimum(outputs, num_outputs - 1).to(tl.int64)  # what is beyond computes the last again
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, WHOLE)
        if LOOK and not SUBTRACT:
            largest = tl.maximum(largest, key_of(base))
    sums = tl.zeros([OUTPUTS, BLOCK], COMPUTE)
    for t in tl.range(num_tasks, loop_unroll_factor=4):
        x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, COMPUTE, WHOLE)
        if SUBTRACT:
            x = x - base
        if DROP:
            x = tl.where(is_finite(x), x, 0.0)
        if LOOK:
            largest = tl.maximum(largest, key_of(x))
        sums = _add_product(x, tl.load(coefficients + (known * num_tasks + t) * num_blocks + block), sums, FUSED)
    if DIVIDE:
        sums = divide(sums, tl.load(numbers).to(COMPUTE) + tl.zeros([OUTPUTS, BLOCK], COMPUTE))
    if SCALED_BASE:
        sums = _add_product(base, tl.load(base_coefficients + known * num_blocks + block), sums, FUSED)
    elif HAS_BASE:
        sums = base + sums
    if IN_PLACE:
        tl.debug_barrier()  # several threads may have read what one of them writes
    addresses = tl.load(row + EXPERTS + num_tasks + known)
    kept = outputs < num_outputs
    if not WHOLE:
        kept = kept & (lanes < left)
    tl.store(pointer_to(addresses, STORED, WHOLE) + at + lanes, sums.to(STORED), mask=kept)
    return largest


@triton.jit
def _add_product(x, factor, sums, FUSED: tl.constexpr):
    if FUSED:
        sums = tl.fma(x, factor, sums)
    else:
        sums = sums + x * factor
    return sums


def mix_out(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    coefficients: Tensor,
    base_coefficients: Tensor | None = None,
    divisor: float = 1.0,
    task_vectors: bool = True,
    fused: bool = False,
    axis: str = "tensor",
    nonfinite: str = "error",
    names: Sequence[str] | None = None,
    *,
    fresh: bool = False,
    out: Sequence[Tensor],
) -> None:
    arguments.check_one_of("axis", axis, AXES)
    if divisor == 0:
        raise RuntimeError("divisor must not be 0, got 0")
    if coefficients.dim() != 3 or coefficients.dtype != torch.float64:
        raise RuntimeError(
            "coefficients must be float64 [num_outputs, num_tasks, num_blocks], got another dtype or shape"
        )
    num_outputs, num_tasks, num_blocks = coefficients.shape
    if num_outputs == 0:
        raise RuntimeError("coefficients must be of at least one output, got none")
    firsts = experts[:: max(1, num_tasks)]
    places = [(0, 1, 1)] * len(firsts) if num_blocks == 1 else places_of(firsts, axis)
    total = sum(count for _, _, count in places)
    if num_blocks not in (1, total):
        raise RuntimeError(f"coefficients must be of 1 block or of {total}, got {num_blocks}")
    if base_coefficients is not None:
        if not base:
            raise RuntimeError("base_coefficients must be None without base, got a tensor")
        if base_coefficients.shape != (num_outputs, num_blocks) or base_coefficients.dtype != torch.float64:
            raise RuntimeError(
                f"base_coefficients must be float64 [{num_outputs}, {num_blocks}], got another dtype or shape"
            )
    scope = Scope(
        base, experts, num_tasks, out, numbers=lambda dtype: [divisor], places=places, num_outputs=num_outputs
    )
    finite = FiniteCheck(scope, nonfinite, names, task_vectors)
    look = finite.wanted and fresh and not scope.in_place
    if not look:
        finite.count()
    of_experts, of_base = (_numbers(table, scope) for table in (coefficients, base_coefficients))
    wide_outputs = triton.next_power_of_2(num_outputs)
    for group in scope.groups:
        _mix[(group.num_chunks,)](
            *group.place, num_tasks, num_outputs, of_experts, of_base, num_blocks, group.numbers, finite.found,
            **group.dtypes, HAS_BASE=scope.has_base, SCALED_BASE=of_base is not None,
            SUBTRACT=scope.has_base and task_vectors, DIVIDE=divisor != 1, FUSED=fused,
            PLACED=axis != "tensor" and num_blocks > 1, IN_PLACE=scope.in_place, DROP=nonfinite == "drop",
            CHECKED=finite.wanted and not look, LOOK=INFINITY_STORED[group.dtype] if look else 0, CHUNK=CHUNK,
            OUTPUTS=wide_outputs, BLOCK=max(128, min(1024, SUMS // wide_outputs)), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    finite.look()
    scope.deliver()


def places_of(tensors: Sequence[Tensor], axis: str) -> list[tuple[int, int, int]]:
    """Element i of a tensor takes block ``first + i // step % count``: of each tensor first, step and count."""
    places = []
    first = 0
    for tensor in tensors:
        count = num_blocks_of(tensor.shape, axis)
        step = tensor.shape[-1] if axis == "row" and tensor.dim() > 1 else 1
        places.append((first, max(1, step), count))
        first += count
    return places


def _numbers(table: Tensor | None, scope: Scope) -> Tensor | None:
    """In the compute type, on the device."""
    if table is None:
        return None
    if table.device not in (torch.device("cpu"), scope.device):
        raise RuntimeError(f"coefficients must be on the CPU or on {scope.device}, got {table.device}")
    table = table.to(scope.compute).contiguous()
    return upload(table, scope.device) if table.device.type == "cpu" else table
