"""How far two checkpoints are apart, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Releasing
from .reading.mapped_file import many_files_open
from .reading.opening import open_checkpoint
from .reading.source import TensorInfo

CHUNK = 1 << 22  # elements compared at a time


@dataclass(frozen=True)
class TensorDifference:
    """What sets a tensor of two checkpoints apart."""

    name: str
    first: TensorInfo | None  # None: the checkpoint has no such tensor
    second: TensorInfo | None
    max_abs: float = math.inf  # largest |a - b|, in float64; infinity where only one is NaN, or the shapes differ
    max_rel: float = math.inf  # largest |a - b| / |a|, infinity where a is 0
    count: int = 0  # elements that differ


def diff(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Iterator[TensorDifference]:
    """Every tensor whose values, shape or dtype differ between two checkpoints, or that one of them lacks.

    Values are compared as float64; NaN equals NaN and 0 equals -0. Reads both checkpoints once.

    Raises:
        ValueError, FileNotFoundError: one of them cannot be opened.
    """
    with (
        many_files_open(),
        closing(open_checkpoint(first)) as a,
        closing(open_checkpoint(second)) as b,
        Releasing([a.release, b.release]),
    ):
        for name in dict.fromkeys([*a.tensors, *b.tensors]):
            of_a, of_b = a.tensors.get(name), b.tensors.get(name)
            found = TensorDifference(name, of_a, of_b)
            if of_a and of_b and of_a.shape == of_b.shape:
                found = TensorDifference(name, of_a, of_b, *_compare(a.tensor(name), b.tensor(name)))
                if found.count == 0 and of_a.dtype == of_b.dtype:
                    continue
            yield found


def _compare(a: Tensor, b: Tensor) -> tuple[float, float, int]:
    common = torch.promote_types(_widest(a.dtype), _widest(b.dtype))
    exact = torch.promote_types(common, torch.float64)
    max_abs, max_rel, count = 0.0, 0.0, 0
    for x, y in zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True):
        x, y = x.to(common), y.to(common)
        differ = (x != y) & ~(x.isnan() & y.isnan())
        if not (n := int(differ.sum())):
            continue
        x, y = x[differ].to(exact), y[differ].to(exact)
        apart = (x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        count += n
        max_abs = max(max_abs, float(apart.max()))
        max_rel = max(max_rel, float((apart / x.abs()).nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return max_abs, max_rel, count


def _widest(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
