"""Infinity and NaN where they are an error: what a merge makes is refused, what all models hold alike stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..merging.scope import Scope
from ..ops.arguments import name_of
from .loader import Loader
from .steps import Input, Step

BLOCK = 1 << 20  # elements looked at in one go


@dataclass(frozen=True)
class Shared:
    """Entries of one tensor at which all inputs hold the same infinity, as masks do."""

    positions: Tensor  # int64 [count], in the flat tensor
    values: Tensor  # [count]

    def taken_out(self, tensor: Tensor, loader: Loader) -> Tensor:
        """A copy with zeros at these places."""
        copy = loader.copied(tensor)
        copy.view(-1)[self.positions.to(copy.device)] = 0
        return copy

    def put_back(self, tensor: Tensor) -> None:
        tensor.view(-1)[self.positions.to(tensor.device)] = self.values.to(tensor.device, tensor.dtype)


def shared(step: Step) -> Shared | None:
    """The entries of a step that can stay as they are; reads its inputs. None where there are none.

    Raises:
        RuntimeError: an input is finite, but not in the dtype that the recipe casts it to.
    """
    for tensor in step.inputs:
        _check_cast(tensor, step)
    if _is_arranged(step):
        return None
    positions, values = [], []
    for begin in range(0, step.numel, BLOCK):
        at = torch.arange(begin, min(begin + BLOCK, step.numel))
        entries = _entries(step, at)
        same = (entries == entries[0]).all(0) & entries[0].isinf()
        positions.append(at[same])
        values.append(entries[0, same])
    found = Shared(torch.cat(positions), torch.cat(values)) if positions else None
    return found if found is not None and len(found.positions) else None


def without(scope: Scope, found: Sequence[Shared | None], loader: Loader) -> Scope:
    """The scope with copies of the tensors that have such entries, which count as 0 in them."""

    def taken_out(tensors: Sequence[Tensor], entries: Shared | None) -> list[Tensor]:
        return [tensor if entries is None else entries.taken_out(tensor, loader) for tensor in tensors]

    base = (
        [tensor for one, entries in zip(scope.base, found, strict=True) for tensor in taken_out([one], entries)]
        if scope.base
        else []
    )
    experts = [taken_out(tensors, entries) for tensors, entries in zip(scope.experts, found, strict=True)]
    return replace(scope, base=base, experts=experts)


class Produced:
    """Looks at the result of a step piece by piece, while it is in the cache on its way to the disk."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def check(self, result: Tensor, begin: int, end: int) -> None:
        """Writes what all inputs hold alike into a part of a flat result.

        Raises:
            RuntimeError: there is another infinity or NaN; names tensor and dtype.
        """
        piece = result[begin:end]
        # a sum is one fast pass; where only the sum overflows the second look finds nothing
        if bool(piece.sum().isfinite()):
            return
        at = begin + (~piece.isfinite()).nonzero().view(-1)
        if not len(at):
            return
        if _is_arranged(self._step):
            self._refuse(result)
        entries = _entries(self._step, at)
        same = ((entries == entries[0]) | (entries.isnan() & entries[0].isnan())).all(0)
        kept = entries[0].to(result.dtype)
        if not bool((same & (kept.isfinite() | ~entries[0].isfinite())).all()):
            self._refuse(result)
        result[at] = kept

    def _refuse(self, result: Tensor) -> None:
        count = sum(int((~block.isfinite()).sum()) for block in result.split(BLOCK))
        of_16_bits = result.dtype == torch.float16
        raise RuntimeError(
            f"merged must be finite, got {count} NaN or infinite values in tensor {self._step.name!r} in "
            f"{name_of(result.dtype)}" + (": bfloat16 and float32 have room for larger numbers" if of_16_bits else "")
        )


def _check_cast(tensor: Input, step: Step) -> None:
    if tensor.info.dtype == step.dtype or tensor.rows is not None:
        return
    lost = 0
    for block in tensor.source.tensor(tensor.name).reshape(-1).split(BLOCK):
        lost += int((block.isfinite() & ~block.to(step.dtype).isfinite()).sum())
    if lost:
        raise RuntimeError(
            f"{tensor.source.name} must have numbers that {name_of(step.dtype)} holds, which the recipe casts to, got "
            f"{lost} too large in tensor {tensor.name!r} in {name_of(tensor.info.dtype)}: choose another dtype"
        )


def _is_arranged(step: Step) -> bool:
    """Whether it is a vocabulary whose rows do not lie in the inputs as in the result; those are no masks."""
    return any(tensor.rows is not None for tensor in step.inputs)


def _entries(step: Step, at: Tensor) -> Tensor:
    """What the inputs hold there.  # float64 [num_inputs, count]"""
    flat = [tensor.source.tensor(tensor.name).reshape(-1) for tensor in step.inputs]
    return torch.stack([tensor[at].double() for tensor in flat])
