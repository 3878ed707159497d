"""Tensors of a scope in blocks that stay in the cache, for methods that are a few steps of torch on every element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    @property
    def task_vectors(self) -> Tensor:
        return self.experts - self.base


def blocks(scope: Scope, dtype: torch.dtype | None, *, nonfinite: str, by_row: bool = False) -> Iterator[Block]:
    """The blocks of a scope of one tensor with a base, in order.

    Args:
        dtype: What the inputs are cast to; None leaves them as they are stored.
        nonfinite: "error" raises for the first block with NaN or infinity; "drop" puts the base's entry in its place.
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
        if nonfinite == "error" and not (of_experts.isfinite().all() and of_base.isfinite().all()):
            scope.check_finite()
        if nonfinite == "drop":
            of_experts = torch.where(of_experts.isfinite(), of_experts, of_base)
        yield Block(of_base, of_experts, out[begin : begin + step])


Keys = Callable[[], Iterator[Tensor]]  # every block's keys, 0 or greater, float32 or float64; the same at every call


def ranked(keys: Keys, ranks: list[int]) -> list[Tensor]:
    """The keys of ascending ranks, 0 the smallest, exact and without a sort: two passes of counting for float32.

    Returns:
        One 0-d tensor of the keys' dtype for every rank.
    """
    first = next(keys())
    whole = torch.int64 if first.dtype == torch.float64 else torch.int32
    return [_ranked(keys, rank, whole).view(first.dtype) for rank in ranks]


def _ranked(keys: Keys, rank: int, whole: torch.dtype) -> Tensor:
    """Narrowed from the highest bits down: what is known of the key is its `prefix`."""
    shift, prefix, device = torch.iinfo(whole).bits, 0, next(keys()).device
    while shift:
        shift -= BITS
        counts = torch.zeros(1 << BITS, dtype=torch.int64, device=device)
        for block in keys():
            bits = block.flatten().view(whole).long()
            inside = bits[bits >> (shift + BITS) == prefix] if shift + BITS < torch.iinfo(whole).bits else bits
            counts += torch.bincount(inside >> shift & (1 << BITS) - 1, minlength=1 << BITS)
        below = counts.cumsum(0)
        digit = int((below <= rank).sum())
        rank -= int(below[digit - 1]) if digit else 0
        prefix = prefix << BITS | digit
    return torch.tensor(prefix, dtype=whole, device=device)
