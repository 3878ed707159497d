"""Prints the bytes by which one merge raises the peak of resident memory, beyond inputs and output.

python -m tests.peak_memory CASE DTYPE OPTIONS: a process of its own, for the peak never falls again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgery_kernels import gram, masks, merge_state_dicts, ties_merge

INPUT_BYTES = 32 << 20
NUM_TASKS = 3


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def one_tensor(inputs: list[Tensor], options: dict[str, Any]) -> Tensor:
    return ties_merge(inputs[0], inputs[1:], **options)


def state_dict(inputs: list[Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    base, *experts = (dict(enumerate(x.tensor_split(7))) for x in inputs)
    base, *experts = ({f"layer{i}": part for i, part in named.items()} for named in (base, *experts))
    return merge_state_dicts(base, experts, **options)


def drawn(inputs: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    base, *experts = (x.view(-1, min(x.numel(), 1 << 10)) for x in inputs)
    return masks(base, experts, density=0.5, **options)


def one_row(inputs: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return masks(inputs[0], inputs[1:], density=0.5, **options)


def products(inputs: list[Tensor], options: dict[str, Any]) -> Tensor:
    base, *experts = (x.view(-1, min(x.numel(), 1 << 10)) for x in inputs)
    return gram(base, experts, **options)


def eager(inputs: list[Tensor], options: dict[str, Any]) -> Tensor:
    """What the measurement must catch: one task vector in memory."""
    return inputs[0] + (inputs[1] - inputs[0])


def main(case: Callable[[list[Tensor], dict[str, Any]], Any], dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.set_num_threads(2)
    case([torch.zeros(9, dtype=dtype) for _ in range(1 + NUM_TASKS)], options)
    # filled in place: making the inputs must not raise the peak above what they hold
    inputs = [torch.empty(INPUT_BYTES // dtype.itemsize, dtype=dtype).normal_() for _ in range(1 + NUM_TASKS)]
    before = resident("VmRSS")
    result = case(inputs, options)
    print(resident("VmHWM") - before - INPUT_BYTES)
    del result


if __name__ == "__main__":
    cases = {
        "one_tensor": one_tensor,
        "state_dict": state_dict,
        "masks": drawn,
        "one_row": one_row,
        "gram": products,
        "eager": eager,
    }
    main(cases[sys.argv[1]], getattr(torch, sys.argv[2]), json.loads(sys.argv[3]))
