"""What NaN and infinity do: found on the device, told by the host once the work is in the queue."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments, looks
from .addresses import BASE, CHUNK, EXPERTS, Group, Scope, is_capturing, is_whole, load, locate

# Keys from which on a number is infinite where it is stored, half a step beyond the largest.
INFINITY_STORED = {
    torch.float64: 0x7FF0000000000000,
    torch.float32: 0x7F800000,
    torch.float16: 0x477FF000,
    torch.bfloat16: 0x7F7F8000,
}


@triton.jit
def key_of(x):
    """The magnitude as an integer, which orders like it and puts infinity and then NaN on top."""
    if x.dtype == tl.float64:
        key = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


@triton.jit
def is_finite(x):
    return is_finite_key(key_of(x))


@triton.jit
def is_finite_key(key):
    if key.dtype == tl.int64:
        finite = key < 0x7FF0000000000000
    else:
        finite = key < 0x7F800000
    return finite


@triton.jit
def task_vector(expert, base, HAS_BASE: tl.constexpr, DROP: tl.constexpr):
    """expert - base in the dtype that stores them, two at a time where it has 16 bits; where DROP, 0 for what is not
    finite."""
    x = expert
    if HAS_BASE:
        x = expert - base
    if DROP:
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    return x


@triton.jit
def _count_nonfinite(
    table, num_parts, columns, num_tasks, found,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, SUBTRACT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    if is_whole(row, count, CHUNK):
        bad = _nonfinite_of(row, begin, count, num_tasks, STORED, COMPUTE, HAS_BASE, SUBTRACT, True, CHUNK)
    else:
        bad = _nonfinite_of(row, begin, count, num_tasks, STORED, COMPUTE, HAS_BASE, SUBTRACT, False, CHUNK)
    if bad > 0:
        tl.atomic_add(found, bad.to(tl.int64), sem="relaxed")


@triton.jit
def _nonfinite_of(
    row, begin, count, num_tasks,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, HAS_BASE: tl.constexpr, SUBTRACT: tl.constexpr,
    WHOLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)
    base = tl.zeros([CHUNK], STORED)
    if HAS_BASE:
        base = load(tl.load(row + BASE), begin, lanes, count, STORED, STORED, WHOLE)
    largest = key_of(base.to(COMPUTE))  # what is not finite leaves no difference finite
    for t in tl.range(num_tasks, loop_unroll_factor=2):
        expert = load(tl.load(row + EXPERTS + t), begin, lanes, count, STORED, STORED, WHOLE)
        largest = tl.maximum(largest, key_of(task_vector(expert, base, SUBTRACT, False).to(COMPUTE)))
    return tl.sum(tl.where(is_finite_key(largest), 0, 1))


class FiniteCheck:
    """nonfinite="error": kernels count into `found` and write nothing once it is not 0; `look` tells the user."""

    def __init__(self, scope: Scope, nonfinite: str, names: Sequence[str] | None, task_vectors: bool = True) -> None:
        arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
        self.wanted = nonfinite == "error"
        if self.wanted and is_capturing(scope.device):
            raise ValueError("nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured, got 'error'")
        self.found = torch.zeros(1, dtype=torch.int64, device=scope.device) if self.wanted else None
        self._scope, self._names = scope, names or []
        self._certain = True
        self._subtract = scope.has_base and task_vectors

    def count(self) -> None:
        """One read of everything, for a merge that has no other reason to read twice."""
        if self.wanted:
            for group in self._scope.groups:
                self._launch(group)

    def _launch(self, group: Group) -> None:
        _count_nonfinite[(group.num_chunks,)](
            *group.place, self._scope.num_tasks, self.found, **group.dtypes, HAS_BASE=self._scope.has_base,
            SUBTRACT=self._subtract, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip

    def suspect(self, sums: Tensor) -> None:
        """In place of `count`: what is not finite has no finite sum, though sums may overflow without."""
        if self.found is not None:
            self.found.copy_((~sums.isfinite()).sum())
            self._certain = False

    def look(self) -> None:
        """Waits for the device unless looks are put off; never put off where outputs are delivered behind it."""
        if self.found is not None:
            scope = self._scope  # which holds contiguous copies: they need not stay for a look that is put off
            inputs = looks.Inputs(
                scope.base, scope.experts, scope.num_tasks, scope.compute, self._names, self._subtract, self._certain
            )
            looks.look(self.found, inputs.tell, at_once=scope.delivers)
