"""Tensors between borders of NaN: what a kernel reads past an end shows in its result, what it writes there remains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BORDER = 64  # elements before and after


def guarded(x: Tensor, device: torch.device, shift: int = 0) -> Tensor:
    """A copy on `device`, `shift` elements behind an address that is a multiple of 16 bytes."""
    buffer = torch.full((x.numel() + 2 * BORDER + shift,), math.nan, dtype=x.dtype, device=device)
    view = buffer[BORDER + shift : BORDER + shift + x.numel()].view(x.shape)
    return view.copy_(x)


def assert_border_kept(x: Tensor) -> None:
    flat = x.reshape(-1)
    around = flat.as_strided((flat.storage_offset() + x.numel() + BORDER,), (1,), 0)
    assert around[: flat.storage_offset()].isnan().all(), "written before the beginning"
    assert around[-BORDER:].isnan().all(), "written past the end"


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.launches += 1
        return self.kernel[grid]
