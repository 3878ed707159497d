"""Tensors of a scope in blocks that stay in the cache, for methods that are a few steps of torch on every element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .scope import Scope

BLOCK = 1 << 16  # elements; on a GPU a tensor is one block
BITS = 16  # of a key, decided by one pass


@dataclass(frozen=True)
class Block:
    """Some elements of one tensor, or some of its rows."""

    base: Tensor  # [num_params], or [rows, row length]
    experts: Tensor  # [num_tasks, *base.shape]
    out: Tensor
    original: Tensor | None = None  # the base where NaN or infinity was dropped from it; 0 stands there in the others

    @property
    def task_vectors(self) -> Tensor:
        return self.experts - self.base

    def write(self, merged: Tensor) -> None:
        """Fills `out`; an entry of the base that was dropped stays what it was."""
        if self.original is not None:
            merged = torch.where(self.original.isfinite(), merged, self.original)
        self.out.copy_(merged)


def blocks(scope: Scope, dtype: torch.dtype, *, nonfinite: str, by_row: bool = False) -> Iterator[Block]:
    """The blocks of a scope of one tensor with a base, in order.

    Args:
        dtype: What the inputs are cast to.
        nonfinite: "error" raises for the first block with a task vector of NaN or infinity; "drop" makes it 0.
        by_row: Whole rows of the last dimension.

    Raises:
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names tensor, model and count.
    """
    row = scope.out[0].shape[-1] if by_row and scope.out[0].dim() else 1
    shape = (-1, row) if by_row else (-1,)
    if scope.out[0].numel() == 0:
        return
    base, out = scope.base[0].reshape(shape), scope.out[0].view(shape)
    experts = [expert.reshape(shape) for expert in scope.experts[0]]
    step = len(base) if base.is_cuda else max(1, BLOCK // row)
    for begin in range(0, len(base), step):
        of_base = base[begin : begin + step].to(dtype)
        of_experts = torch.stack([expert[begin : begin + step] for expert in experts]).to(dtype)
        block = Block(of_base, of_experts, out[begin : begin + step])
        if nonfinite != "propagate" and not block.task_vectors.isfinite().all():
            if nonfinite == "error":
                scope.check_finite(dtype=dtype)
            block = _dropped(block)
        yield block


def _dropped(block: Block) -> Block:
    """The same with every task vector finite."""
    known = block.base.isfinite()
    base = torch.where(known, block.base, 0.0)
    experts = torch.where(block.task_vectors.isfinite(), block.experts, base)
    return Block(base, experts, block.out, original=None if known.all() else block.base)


Keys = Callable[[], Iterator[Tensor]]  # every block's keys, 0 or greater, float32 or float64; the same at every call


def ranked(keys: Keys, ranks: Sequence[int]) -> list[Tensor]:
    """The keys of these ranks, 0 the smallest, exact and without a sort: two passes of counting for float32.

    What is known of a key, its `prefix`, grows from the highest bits down. NaN ranks above everything.

    Returns:
        One 0-d tensor of the keys' dtype for every rank.
    """
    first = next(keys())
    whole = torch.int64 if first.dtype == torch.float64 else torch.int32
    prefixes, left = [0] * len(ranks), list(ranks)  # left: the rank among the keys with the prefix
    for shift in range(torch.iinfo(whole).bits - BITS, -1, -BITS):
        counts = {prefix: torch.zeros(1 << BITS, dtype=torch.int64, device=first.device) for prefix in prefixes}
        for block in keys():
            leading = block.flatten().abs().view(whole).long() >> shift
            for prefix, count in counts.items():
                digits = leading[leading >> BITS == prefix] & (1 << BITS) - 1
                count += torch.bincount(digits, minlength=1 << BITS)
        for index, (prefix, rank) in enumerate(zip(prefixes, left, strict=True)):
            below = counts[prefix].cumsum(0)
            digit = int((below <= rank).sum())
            left[index] = rank - (int(below[digit - 1]) if digit else 0)
            prefixes[index] = prefix << BITS | digit
    return list(torch.tensor(prefixes, dtype=whole, device=first.device).view(first.dtype))
