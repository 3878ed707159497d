"""What a merge keeps besides its limits: by packed masks, by random numbers drawn as it reads, below an upper limit.

Kernels read all of it from one table of int64: HEAD numbers, EXPERT numbers of every expert, PART numbers of every
tensor of the launch.
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

from .addresses import Scope, is_capturing, upload
from .random_bits import block_words, ids, limit_of
from .trim_rounds import LARGEST

SEED, MIN_COUNT, HEAD = (tl.constexpr(field) for field in range(3))
WORDS_BELOW, TASK_ID, UPPER, UPPER_CUT, EXPERT = (tl.constexpr(field) for field in range(5))
BITS, BYTES, TENSOR_ID, PART = (tl.constexpr(field) for field in range(4))  # BYTES: from an expert's bits to the next's

# flags of KEEP, which stands behind them: in the interpreter it is a bare int
GIVEN, DRAWN, BELOW, COUNTED = (
    tl.constexpr(1 << flag) for flag in range(4)
)  # flags of KEEP, which stands behind them: in the interpreter it is a bare int


@triton.jit
def _drawn(tensor, keep, expert, at, BLOCK: tl.constexpr):
    """Which random words of a block, whose first element is a multiple of 4, are below the expert's limit."""
    blocks = at // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    words = block_words(tl.load(keep + SEED), tl.load(tensor + TENSOR_ID), tl.load(expert + TASK_ID), blocks)
    limit = tl.load(expert + WORDS_BELOW)
    even = tl.interleave((words[0] < limit).to(tl.int32), (words[2] < limit).to(tl.int32))
    odd = tl.interleave((words[1] < limit).to(tl.int32), (words[3] < limit).to(tl.int32))
    return tl.interleave(even, odd) != 0


@triton.jit
def narrowed(
    kept, key, keep, part, num_tasks, t, at, flat, lanes, left,
    COMPUTE: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Less what masks, random words and the upper limit drop; at, flat: of the first lane, in tensor and scope."""
    expert = keep + HEAD + t * EXPERT
    tensor = keep + HEAD + num_tasks * EXPERT + part * PART
    if GIVEN & KEEP:
        bits = tl.load(tensor + BITS).to(tl.pointer_type(tl.uint8)) + t * tl.load(tensor + BYTES) + at // 8
        if WHOLE:
            byte = tl.load(bits + lanes // 8)
        else:
            byte = tl.load(bits + lanes // 8, mask=lanes < left, other=0)
        kept = kept & ((byte.to(tl.int32) >> (lanes % 8) & 1) != 0)
    if DRAWN & KEEP:
        kept = kept & _drawn(tensor, keep, expert, at, BLOCK)
    if BELOW & KEEP:
        upper = tl.load(expert + UPPER)
        before_cut = tl.minimum(tl.maximum(tl.load(expert + UPPER_CUT) - flat, 0), BLOCK).to(tl.int32)
        if COMPUTE == tl.float64:  # noqa: SIM300
            infinity = tl.full([], 0x7FF0000000000000, tl.int64)
        else:
            infinity = tl.full([], 0x7F800000, tl.int32)
            upper = upper.to(tl.int32)
        limit = tl.where(lanes < before_cut, upper - 1, upper)
        kept = kept & ((key <= limit) | (key > infinity))  # NaN has to reach the output
    return kept


@triton.jit
def base_unless_enough(merged, base, kept_count, keep):
    return tl.where(kept_count < tl.load(keep + MIN_COUNT), base, merged)


@dataclass(frozen=True)
class Keep:
    """The options, checked."""

    num_tasks: int
    keep: Sequence[Tensor] | None = None
    upper: Tensor | None = None
    upper_cuts: Sequence[int] | None = None
    keep_density: Sequence[float] | None = None
    seed: int = 0
    tensor_ids: Sequence[int] | None = None
    task_ids: Sequence[int] | None = None
    min_count: int = 0

    def __post_init__(self) -> None:
        if self.upper_cuts is not None and self.upper is None:
            raise RuntimeError("upper must be given where upper_cuts are, got none")
        if self.upper_cuts is not None and len(self.upper_cuts) != self.num_tasks:
            raise RuntimeError(f"upper_cuts must be one per expert, got {len(self.upper_cuts)}")
        if not 0 <= self.min_count <= self.num_tasks:
            raise RuntimeError(f"min_count must be between 0 and the number of experts, got {self.min_count}")
        for density in self.keep_density or ():
            if not density >= 0:
                raise RuntimeError(f"keep_density must be 0 or greater, got {density:g}")
        if self.keep_density is not None and len(self.keep_density) != self.num_tasks:
            raise RuntimeError(
                f"keep_density must be one number per expert ({self.num_tasks}), got {len(self.keep_density)}"
            )

    @property
    def by_mask(self) -> bool:
        return self.keep is not None or self.keep_density is not None

    @property
    def flags(self) -> int:
        wanted = (
            (GIVEN, self.keep is not None),
            (DRAWN, self.keep_density is not None),
            (BELOW, self.upper is not None),
            (COUNTED, self.min_count > 0),
        )
        return sum(flag.value for flag, is_wanted in wanted if is_wanted)

    def tables(self, scope: Scope) -> list[Tensor | None]:
        """What kernels read, of every group of the scope."""
        if self.flags == 0:
            return [None] * len(scope.groups)
        firsts = scope.experts[:: scope.num_tasks]
        given = None if self.keep is None else _checked(self.keep, firsts, scope)
        tensor_ids = ids("tensor_ids", self.tensor_ids, len(firsts), "merged tensor")
        task_ids = ids("task_ids", self.task_ids, self.num_tasks, "expert")
        densities = self.keep_density or [0.0] * self.num_tasks
        cuts = self.upper_cuts or [0] * self.num_tasks
        words = [self.seed, self.min_count]
        for density, task_id, cut in zip(densities, task_ids, cuts, strict=True):
            words += [limit_of(density), task_id, 0, cut]
        upper = None if self.upper is None else given_keys(self.upper, scope, "upper", self.upper_cuts is not None)
        tables: list[Tensor | None] = []
        for group in scope.groups:
            rows = list(words)
            for part in scope.parts_of(group):
                bits = None if given is None else given[part]
                stride = 0 if bits is None or len(bits) == 1 else bits.shape[1]
                rows += [0 if bits is None else bits.data_ptr(), stride, tensor_ids[part]]
            table = upload(torch.tensor(rows, dtype=torch.int64), scope.device)
            if upper is not None:
                table[HEAD.value + UPPER.value :: EXPERT.value][: self.num_tasks] = upper
            tables.append(table)
        scope.hold(given or [])  # until the launches are in the queue
        return tables


def given_keys(thresholds: Tensor, scope: Scope, argument: str, may_be_nan: bool) -> Tensor:
    """Thresholds as integers; may_be_nan: a rank may have found NaN, where it propagates.  # int64 [num_tasks]"""
    if thresholds.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{argument} must be float32 or float64, got {thresholds.dtype}")
    if thresholds.numel() != scope.num_tasks:
        raise RuntimeError(f"{argument} must be one value per expert, got {thresholds.numel()}")
    if not is_capturing(scope.device):
        for value in thresholds.tolist():
            if not value >= 0 and not (may_be_nan and math.isnan(value)):
                raise RuntimeError(f"{argument} must be 0 or greater, got {value:g}")
    values = thresholds.reshape(-1).to(scope.compute)
    values = upload(values, scope.device) if values.device.type == "cpu" else values
    return values.view(torch.int64 if scope.wide else torch.int32).to(torch.int64) & LARGEST[scope.compute]


def _checked(keep: Sequence[Tensor], firsts: Sequence[Tensor], scope: Scope) -> list[Tensor]:
    if len(keep) != len(firsts):
        raise RuntimeError(f"keep must be one tensor for every merged tensor, got {len(keep)} for {len(firsts)}")
    for bits, first in zip(keep, firsts, strict=True):
        wanted = -(-first.numel() // 8)
        if bits.dtype != torch.uint8 or bits.shape not in ((1, wanted), (scope.num_tasks, wanted)):
            raise RuntimeError(f"keep must be uint8 [num_tasks or 1, {wanted}], got {bits.dtype} {tuple(bits.shape)}")
        if bits.device != scope.device:
            raise RuntimeError(f"keep must be on the device of experts[0], {scope.device}, got {bits.device}")
    return [bits.contiguous() for bits in keep]
