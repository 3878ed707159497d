"""Packed masks on CUDA tensors: the bits of the CPU, and its sums in their order.

Ranks within rows come from torch's stable sort of a few rows at a time; everything else is two kernels, one that draws
a byte per lane, and one that sums a block of a tensor per warp.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from ..ops.masks import RULES
from .addresses import BASE, CHUNK, EXPERTS, NUMEL, Group, Scope, load, locate, part_of, upload
from .finite import FiniteCheck, task_vector
from .random_bits import block_words, ids, limit_of
from .sums import LANES, SUM_BLOCK, fold_halves, fold_lanes
from .trim import INFINITY

MOST_RANKED = 1 << 20  # entries whose ranks are in memory at a time
BLOCK_BYTES = 512  # of bits by rank: a program's share

# What a kernel knows of a tensor beside its row of addresses, int64: where its bits are, its id, blocks before it.
BITS, TENSOR_ID, FIRST_BLOCK = (tl.constexpr(column) for column in range(3))
COLUMNS = tl.constexpr(3)


@triton.jit
def _store_bits(bits, byte, seed, tensor_id, task_id, begin, limits, count, BY_RANK: tl.constexpr):
    """Bytes of bits, of which `count` follow entry `begin`; limits: of every entry from there, or one for all."""
    value = tl.zeros(byte.shape, tl.int32)
    for half in tl.static_range(2):
        words = block_words(seed, tensor_id, task_id, begin // 4 + byte * 2 + half)
        for j in tl.static_range(4):
            entry = byte * 8 + half * 4 + j
            if BY_RANK:
                limit = tl.load(limits + entry, mask=entry < count, other=0)
            else:
                limit = limits
            value |= ((words[j] < limit) & (entry < count)).to(tl.int32) << (half * 4 + j)
    tl.store(bits + byte, value.to(tl.uint8), mask=byte * 8 < count)


@triton.jit
def _draw(
    table, num_parts, columns, tensors, seed, limits, task_ids,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of the bits of one expert."""
    part, row, begin, count = locate(table, num_parts, columns, CHUNK)
    t = tl.program_id(1)
    bytes_of_expert = (tl.load(row + NUMEL) + 7) // 8
    bits = tl.load(tensors + part * COLUMNS + BITS).to(tl.pointer_type(tl.uint8)) + t * bytes_of_expert + begin // 8
    _store_bits(
        bits, tl.arange(0, CHUNK // 8).to(tl.int64), tl.load(seed), tl.load(tensors + part * COLUMNS + TENSOR_ID),
        tl.load(task_ids + t), begin, tl.load(limits + t), count, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensor_id", "begin", "count"])
def _draw_by_rank(
    bits, seed, tensor_id, task_id, begin, limits, count,
    BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Bits from entry `begin` of a tensor on, each below the limit of its own."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    _store_bits(bits, byte, tl.load(seed), tensor_id, tl.load(task_id), begin, limits, count, True)


@triton.jit
def _sum(
    table, num_parts, columns, tensors, sums, num_blocks,
    STORED: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    SUM_BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What the bits of a block keep.  # sums: [3, num_tasks, num_blocks]"""
    block, t = tl.program_id(0), tl.program_id(1)
    part = part_of(tensors, num_parts, COLUMNS, block, FIRST_BLOCK).to(tl.int64)
    row, tensor = table + part * columns, tensors + part * COLUMNS
    numel = tl.load(row + NUMEL)
    begin = (block - tl.load(tensor + FIRST_BLOCK)) * SUM_BLOCK
    count = tl.minimum(numel - begin, SUM_BLOCK).to(tl.int32)
    bits = tl.load(tensor + BITS).to(tl.pointer_type(tl.uint8)) + t * ((numel + 7) // 8) + begin // 8
    lanes = tl.arange(0, LANES)
    all = tl.zeros([LANES], tl.float64)
    kept_norm = tl.zeros([LANES], tl.float64)
    kept = tl.zeros([LANES], tl.int32)
    expert_address, base_address = tl.load(row + EXPERTS + t), tl.load(row + BASE)
    for at in tl.range(0, count, LANES, loop_unroll_factor=8):
        x = load(expert_address, begin + at, lanes, count - at, STORED, STORED, False)
        base = x
        if HAS_BASE:
            base = load(base_address, begin + at, lanes, count - at, STORED, STORED, False)
        norm = tl.abs(task_vector(x, base, HAS_BASE, DROP)).to(tl.float64)
        bit = tl.load(bits + at // 8 + lanes // 8, mask=lanes < count - at, other=0).to(tl.int32) >> (lanes % 8) & 1
        all += norm
        kept_norm += tl.where(bit == 1, norm, 0.0)
        kept += bit
    to = sums + t * num_blocks + block
    step = tl.num_programs(1) * num_blocks
    tl.store(to, tl.sum(kept).to(tl.float64))
    tl.store(to + step, tl.sum(fold_lanes(all[None, :], LANES)))
    tl.store(to + 2 * step, tl.sum(fold_lanes(kept_norm[None, :], LANES)))


@dataclass(frozen=True)
class Draws:
    """What is drawn, on the device."""

    seed: Tensor  # int64 [1]
    limits: Tensor  # int64 [num_tasks]
    task_ids: Tensor  # int64 [num_tasks]


def masks(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    density: Sequence[float],
    rule: str = "random",
    epsilon: Sequence[float] | None = None,
    seed: int = 0,
    tensor_ids: Sequence[int] | None = None,
    task_ids: Sequence[int] | None = None,
    nonfinite: str = "propagate",
    names: Sequence[str] | None = None,
) -> tuple[list[Tensor], Tensor]:
    arguments.check_one_of("rule", rule, RULES)
    num_tasks = len(density)
    scope = Scope(base, experts, num_tasks)
    firsts = experts[::num_tasks]
    tensor_ids = ids("tensor_ids", tensor_ids, len(firsts), "merged tensor")
    task_ids = ids("task_ids", task_ids, num_tasks, "expert")
    ranges = _ranges(epsilon, density) if rule == "della" else None
    finite = FiniteCheck(scope, nonfinite, names)
    words = torch.tensor([seed, *map(limit_of, density), *task_ids], dtype=torch.int64)
    draws = Draws(*upload(words, scope.device).split([1, num_tasks, num_tasks]))
    bits = [torch.empty(num_tasks, -(-x.numel() // 8), dtype=torch.uint8, device=scope.device) for x in firsts]
    sums = torch.zeros(len(firsts), num_tasks, 3, dtype=torch.float64, device=scope.device)
    for group in scope.groups:
        parts = scope.parts_of(group)
        blocks = [-(-firsts[part].numel() // SUM_BLOCK) for part in parts]
        before = [sum(blocks[:i]) for i in range(len(blocks))]
        rows = [[bits[part].data_ptr(), tensor_ids[part], b] for part, b in zip(parts, before, strict=True)]
        tensors = upload(torch.tensor(rows, dtype=torch.int64), scope.device)
        if group.num_chunks == 0:
            continue
        _draw[(group.num_chunks, num_tasks)](
            *group.place, tensors, draws.seed, draws.limits, draws.task_ids, CHUNK=CHUNK, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        if ranges is not None:
            for part in parts:
                for t in range(num_tasks):
                    if density[t] < 1:
                        _rank(scope, part, t, bits[part][t], tensor_ids[part], draws, density[t], ranges[t], nonfinite)
        of_blocks = _sum_blocks(scope, group, tensors, sum(blocks), nonfinite)
        for part, first, count in zip(parts, before, blocks, strict=True):
            of_part = of_blocks[..., first : first + count]
            sums[part, :, 0] = of_part[0].sum(dim=-1)  # of whole numbers: in any order
            sums[part, :, 1:] = fold_halves(of_part[1:]).T
    finite.suspect(sums)
    finite.look()
    return bits, sums


def _sum_blocks(scope: Scope, group: Group, tensors: Tensor, num_blocks: int, nonfinite: str) -> Tensor:
    """[3, num_tasks, num_blocks]"""
    sums = torch.empty(3, scope.num_tasks, num_blocks, dtype=torch.float64, device=scope.device)
    _sum[(num_blocks, scope.num_tasks)](
        *group.place, tensors, sums, num_blocks, STORED=group.dtypes["STORED"], HAS_BASE=scope.has_base,
        DROP=nonfinite == "drop", SUM_BLOCK=SUM_BLOCK, LANES=LANES, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return sums


def _rank(
    scope: Scope, part: int, t: int, bits: Tensor, tensor_id: int, draws: Draws, density: float, epsilon: float,
    nonfinite: str,
) -> None:  # fmt: skip
    """The bits of one expert of one tensor by rank of magnitude along the second dimension, some rows at a time."""
    expert = scope.experts[part * scope.num_tasks + t]
    view = (1, -1) if expert.dim() < 2 else expert.shape
    if expert.numel() == 0:
        return
    expert, base = expert.reshape(view), scope.base[part].reshape(view) if scope.base else None
    size = expert.shape[1]
    ranks = torch.arange(size, dtype=torch.float64, device=scope.device)
    probability = (density - epsilon) + 2 * epsilon * ranks / max(size - 1, 1) if size > 1 else ranks + density
    limits_of_rank = (probability * 2**32).long().view(1, -1, *[1] * (expert.dim() - 2))
    slab = expert[0].numel()
    step = 8 // math.gcd(8, slab)  # a whole number of bytes
    slabs = step * max(1, MOST_RANKED // (slab * step))
    for first in range(0, len(expert), slabs):
        task_vectors = expert[first : first + slabs]
        if base is not None:
            task_vectors = task_vectors.to(scope.compute) - base[first : first + slabs].to(scope.compute)
        keys = _keys(task_vectors.to(expert.dtype), scope.compute, nonfinite == "drop")
        order = keys.sort(dim=1, stable=True).indices
        limits = torch.empty_like(order).scatter_(1, order, limits_of_rank.expand_as(order))
        begin = first * slab
        _draw_by_rank[(triton.cdiv(limits.numel(), 8 * BLOCK_BYTES),)](
            bits[begin // 8 :], draws.seed, tensor_id, draws.task_ids[t:], begin, limits, limits.numel(),
            BLOCK_BYTES=BLOCK_BYTES, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _keys(task_vectors: Tensor, compute: torch.dtype, drop: bool) -> Tensor:
    """Magnitudes as integers: every NaN is one number, above infinity, so that the order of ties is known."""
    if drop:
        task_vectors = torch.where(task_vectors.isfinite(), task_vectors, 0.0)
    keys = task_vectors.to(compute).abs().contiguous().view(torch.int64 if compute == torch.float64 else torch.int32)
    return keys.clamp(max=INFINITY[compute] + 1)


def _ranges(epsilon: Sequence[float] | None, density: Sequence[float]) -> Sequence[float]:
    if epsilon is None:
        raise RuntimeError("epsilon must be given with rule='della', got none")
    if len(epsilon) != len(density):
        raise RuntimeError(f"epsilon must be one number per expert ({len(density)}), got {len(epsilon)}")
    return epsilon
