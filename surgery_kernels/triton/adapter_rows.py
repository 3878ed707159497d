"""Where the rows of surgery_adapter's tensors lie, and which of them one program corrects together."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SORTED_AT_ONCE = 2048  # samples


@dataclass(frozen=True)
class RowLayout:
    """features [num_tasks, samples, (tokens,) dim], or [samples, (tokens,) dim] with a task for each sample."""

    num_tasks: int
    samples: int  # of a task; all of them with a task_index
    tokens: int
    all_samples: int
    dim: int
    has_tokens: bool
    task_index: Tensor | None  # contiguous int64 [samples]

    @classmethod
    def of(cls, features: Tensor, num_tasks: int, task_index: Tensor | None) -> RowLayout:
        first = 0 if task_index is not None else 1
        if features.dim() not in (first + 2, first + 3):
            raise RuntimeError(f"features must have {first + 2} or {first + 3} dimensions, got {features.dim()}")
        has_tokens = features.dim() == first + 3
        samples = features.shape[first]
        return cls(
            num_tasks=num_tasks,
            samples=samples,
            tokens=features.shape[first + 1] if has_tokens else 1,
            all_samples=samples if first == 0 else features.shape[0] * samples,
            dim=features.shape[-1],
            has_tokens=has_tokens,
            task_index=None if task_index is None else task_index.contiguous(),
        )

    @property
    def rows(self) -> int:
        return self.all_samples * self.tokens

    def strides(self, t: Tensor) -> tuple[int, int, int]:
        """From one task, sample and token to the next, of a tensor laid out like features."""
        group = 0 if self.task_index is not None else t.stride(0)
        sample = t.stride(0 if self.task_index is not None else 1)
        return group, sample, t.stride(-2) if self.has_tokens else 0


@dataclass(frozen=True)
class SampleOrder:
    """The samples task by task, each task's in their order; those without a task come last."""

    order: Tensor  # int32 [samples]
    bounds: Tensor  # int32 [num_tasks + 2]: where each task's samples begin, then those without a task, then the end

    @classmethod
    def of(cls, layout: RowLayout) -> SampleOrder | None:
        """None where the samples lie in this order already."""
        if layout.task_index is None:
            return None
        order = torch.empty_like(layout.task_index, dtype=torch.int32)
        bounds = order.new_empty(layout.num_tasks + 2)
        _sort_kernel[(layout.num_tasks + 1,)](
            layout.task_index,
            order,
            bounds,
            layout.samples,
            layout.num_tasks,
            BLOCK=SORTED_AT_ONCE,
            num_warps=8,
            enable_fp_fusion=False,
        )
        return cls(order, bounds)


@triton.jit
def _sort_kernel(task_index, order, bounds, samples, num_tasks, BLOCK: tl.constexpr):
    """One program a task: counts the samples of the tasks before, then lists its own. Stable, no atomics.

    Reads the task_index twice for every task, out of the cache: for up to some 10^5 samples the launch is what counts.
    """
    own = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, samples, BLOCK):
        task = tl.load(task_index + start + at, mask=start + at < samples, other=0)
        task = tl.where((task >= 0) & (task < num_tasks), task, num_tasks)
        before += ((task < own) & (start + at < samples)).to(tl.int32)
    place = tl.sum(before)
    tl.store(bounds + own, place)
    for start in range(0, samples, BLOCK):
        task = tl.load(task_index + start + at, mask=start + at < samples, other=0)
        task = tl.where((task >= 0) & (task < num_tasks), task, num_tasks)
        mine = (task == own) & (start + at < samples)
        rank = tl.cumsum(mine.to(tl.int32))
        tl.store(order + place + rank - 1, start + at, mask=mine)
        place += tl.sum(mine.to(tl.int32))
    if own == num_tasks:
        tl.store(bounds + num_tasks + 1, place)


@triton.jit
def sample_block(task_index, tokens, samples, num_tasks, blocks, BLOCK: tl.constexpr):
    """Program p: some rows of sample p // blocks. Returns its task, whether there is one, and the rows' samples, tokens
    and whether they are there."""
    sample = tl.program_id(0) // blocks
    if task_index is None:
        task = sample // samples
        known = task >= 0
    else:
        task = tl.load(task_index + sample)
        known = (task >= 0) & (task < num_tasks)
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return task, known, sample + tl.zeros_like(token), token, token < tokens


@triton.jit
def task_block(order, bounds, tokens, samples, num_tasks, blocks, BLOCK: tl.constexpr, TASKS: tl.constexpr):
    """Program p: some rows of one task. Returns what `sample_block` does; TASKS: a power of two above num_tasks."""
    program = tl.program_id(0)
    if order is None:
        task = program // blocks
        block = program % blocks
        known = task >= 0
    else:
        t = tl.arange(0, TASKS)
        first = tl.load(bounds + t, mask=t <= num_tasks, other=0)
        end = tl.load(bounds + t + 1, mask=t <= num_tasks, other=0)
        of_task = tl.cdiv((end - first) * tokens, BLOCK)
        task = tl.sum((tl.cumsum(of_task) <= program).to(tl.int32))
        block = program - tl.sum(tl.where(t < task, of_task, 0))
        known = task < num_tasks
    begin, end = places_of_task(bounds, task, samples, task <= num_tasks)
    row = block * BLOCK + tl.arange(0, BLOCK)
    there = row < (end - begin) * tokens
    sample, token = row_of_task(order, begin, row, tokens, there)
    return task, known, sample, token, there


@triton.jit
def places_of_task(bounds, task, samples, there):
    """The range of a task's samples in the order of the tasks."""
    if bounds is None:
        begin = task * samples
        end = begin + samples
    else:
        begin = tl.load(bounds + task, mask=there, other=0)
        end = tl.load(bounds + task + 1, mask=there, other=0)
    return begin, end


@triton.jit
def row_of_task(order, begin, row, tokens, there):
    """The sample and token of the row-th row of the task whose samples begin at place `begin`."""
    place = begin + row // tokens
    if order is None:
        sample = place
    else:
        sample = tl.load(order + place, mask=there, other=0)
    return sample, row % tokens


@triton.jit
def row_offset(sample, token, samples, strides):
    """Where rows begin, in elements of a tensor with these strides from task to task, sample to sample, token to token.

    With a task_index there is one group of all samples.
    """
    group = (sample // samples).to(tl.int64)
    within = (sample % samples).to(tl.int64)
    return group * strides[0] + within * strides[1] + token.to(tl.int64) * strides[2]
