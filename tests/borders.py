"""Memory with poisoned borders: Triton's interpreter does not notice what is read or written beside a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

BORDER = 256  # elements, so that what was aligned stays so


def poison(dtype: torch.dtype) -> float:
    return torch.nan if dtype.is_floating_point else 77


def in_poisoned_memory(x: Tensor) -> Tensor:
    """A copy of x, in its strides, with borders of NaN that would spoil a sum they get into."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    memory = torch.full((last + 1 + 2 * BORDER,), poison(x.dtype), dtype=x.dtype, device=x.device)
    copy = memory.as_strided(x.shape, x.stride(), BORDER)
    torch.as_strided(memory, (last + 1,), (1,), BORDER).copy_(x.as_strided((last + 1,), (1,)))
    return copy


def is_intact(x: Tensor) -> bool:
    """Whether the borders around x are as they were."""
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    borders = torch.cat([memory[:BORDER], memory[-BORDER:]])
    return bool((borders.isnan() if x.dtype.is_floating_point else borders == poison(x.dtype)).all())


@contextmanager
def guarded_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is allocated inside lies between poisoned borders, which are found intact at the end."""
    allocated = []
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def guarded_new_empty(self: Tensor, *sizes: object, **options: object) -> Tensor:
        if "device" in options:  # the interpreter's own
            return new_empty(self, *sizes, **options)
        allocated.append(in_poisoned_memory(new_empty(self, *sizes, **options)))
        return allocated[-1]

    def guarded_empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        allocated.append(in_poisoned_memory(empty_like(x, dtype=dtype)))
        return allocated[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", guarded_new_empty)
        patch.setattr(torch, "empty_like", guarded_empty_like)
        yield
    assert allocated
    for x in allocated:
        assert is_intact(x), f"written beside a result of shape {tuple(x.shape)}"
