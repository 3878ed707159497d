"""Task vectors no two of whose entries have one magnitude: there is nothing for a toolkit's unstable sort to choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tests.cases import Inputs, generator


def untied(shape: Sequence[int], num_tasks: int, dtype: torch.dtype) -> Inputs:
    """A base and experts of up to 4,096 entries, few enough for all sums of float32 magnitudes to be exact.

    The base is zero for 16-bit dtypes: rounded differences would tie.
    """
    num_params = math.prod(shape)
    g = generator("untied", tuple(shape), num_tasks, dtype)
    base = torch.zeros(num_params, dtype=dtype)
    if dtype.itemsize > 2:
        base = (torch.randint(-64, 65, (num_params,), generator=g) / 64).to(dtype)
    experts = []
    for _ in range(num_tasks):
        order = torch.randperm(num_params, generator=g)
        if dtype.itemsize > 2:
            magnitude = ((order + 1) / 2**13).to(dtype)
        else:  # neighbours among the numbers of the dtype, some below 1 and some above
            one = int(torch.ones((), dtype=dtype).view(torch.int16))
            magnitude = (order + one - num_params // 2).to(torch.int16).view(dtype)
        sign = torch.randint(0, 2, (num_params,), generator=g) * 2 - 1
        experts.append((base + sign * magnitude).reshape(tuple(shape)))
    return base.reshape(tuple(shape)), experts
