"""Programs of steps that reach every instruction, and inputs that reach their edges."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery_kernels.ops.steps import Code, Steps
from tests.cases import generator

NUM_NUMBERS = 6
AXES = ["tensor", "row", "column"]

UNARY = (Code.ABS, Code.NEG, Code.SQRT, Code.EXP, Code.LOG)
BINARY = (Code.ADD, Code.SUB, Code.MUL, Code.DIV, Code.MIN, Code.MAX, Code.GT, Code.GE, Code.EQ)
IN_PLACE = (Code.FMA, Code.SELECT)


def random_program(seed: int, num_inputs: int, length: int = 40, num_registers: int = 9) -> list[int]:
    """Instructions of every kind over registers in any order, three sums, and two outputs at the end."""
    choose = random.Random(seed)
    words: list[int] = []
    for r in range(num_registers):
        words += [Code.LOAD, r, choose.randrange(num_inputs), 0, 0] if r % 3 else [Code.NUMBER, r, r // 3, 0, r % 2]
    kinds = [*UNARY, *BINARY, *BINARY, *IN_PLACE, Code.WITHIN, Code.LOAD]
    for _ in range(length):
        code, d, a, b = choose.choice(kinds), *(choose.randrange(num_registers) for _ in range(3))
        if code == Code.LOAD:
            a = choose.randrange(num_inputs)
        if code == Code.WITHIN:
            b = choose.randrange(NUM_NUMBERS - 1)
        words += [code, d, a, b, choose.randrange(2)]
    for s in range(3):
        words += [Code.DOT if s == 1 else Code.SUM, s, choose.randrange(num_registers), s, 0]
    for j in range(2):
        words += [Code.STORE, j, choose.randrange(num_registers), 0, 0]
    return [int(word) for word in words]


def num_blocks(shape: Sequence[int], axis: str) -> int:
    return 1 if axis == "tensor" or len(shape) < 2 else math.prod(shape[:-1] if axis == "row" else shape[1:])


def numbers_of(num_blocks: int, num_params: int) -> Tensor:
    """[num_blocks, NUM_NUMBERS], some of them values of the inputs, and places in a tensor."""
    g = generator("numbers", num_blocks, num_params)
    numbers = torch.randint(-8, 9, (num_blocks, NUM_NUMBERS), generator=g).double() / 8
    numbers[:, 3] = torch.randint(0, num_params + 1, (num_blocks,), generator=g).double()
    numbers[:, 5] = 0.3
    return numbers


def inputs_of(shape: int | Sequence[int], num_inputs: int, dtype: torch.dtype) -> list[Tensor]:
    """Multiples of 1/8 that tie often, other numbers, and here and there what is not an ordinary number."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    g = generator("steps", shape, num_inputs, dtype)
    tiny = torch.finfo(dtype).smallest_normal
    odd = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny * 3 / 4, torch.finfo(dtype).max, 1.0, 88.0, -103.5],
        dtype=torch.float64,
    )
    inputs = []
    for _ in range(num_inputs):
        whole = torch.randint(-16, 17, shape, generator=g).double() / 8
        x = torch.where(torch.rand(shape, generator=g) < 0.4, torch.randn(shape, generator=g).double(), whole)
        rare = odd[torch.randint(0, len(odd), shape, generator=g)]
        inputs.append(torch.where(torch.rand(shape, generator=g) < 0.1, rare, x).to(dtype))
    return inputs


def scaled_distance() -> Steps:
    """A key: a number times what lies between two tensors, in the compute type."""
    steps = Steps(2)
    with steps.exact():
        steps.store(abs(steps.load(0) - steps.load(1)) * steps.number(0))
    return steps


def ranks_of(size: int) -> list[int]:
    ranks = {0, size, *(min(size, rank) for rank in (1, 2, size // 7, size // 2))}
    return sorted({*ranks, *(-rank for rank in ranks)})


def nearswap() -> Steps:
    """Towards the other tensor by at most number 0, in the steps of mergekit."""
    steps = Steps(2)
    base, other, t = steps.load(0), steps.load(1), steps.number(0)
    distance = abs(base - other).maximum(1e-6)
    weight = (1.0 / distance * t).maximum(0.0).minimum(1.0)
    steps.store(weight * other + (1.0 - weight) * base)
    return steps


def eager_nearswap(base: Tensor, other: Tensor, t: float) -> Tensor:
    weight = (t / (base - other).abs().clamp(min=1e-6)).clamp(min=0.0, max=1.0)
    return weight * other + (1 - weight) * base
